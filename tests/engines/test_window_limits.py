"""What a window refuses or changes at the start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

from polder.engines.vllm.window.limits import check_runner, check_window, limit_graphs
from polder.errors import ConfigError


def compilation(graphs: CUDAGraphMode, **options: Any) -> Any:
    """As vLLM has it when its own checks are over."""
    found = CompilationConfig(**{"mode": CompilationMode.VLLM_COMPILE, "backend": "inductor", **options})
    found.cudagraph_mode = graphs
    found.set_splitting_ops_for_v1(all2all_backend="naive")
    return SimpleNamespace(compilation_config=found)


@pytest.mark.parametrize("mode", [m for m in CUDAGraphMode if m != CUDAGraphMode.NONE])
def test_graphs_are_piecewise_with_a_window_whatever_was_asked(mode: CUDAGraphMode) -> None:
    config = compilation(mode)
    limit_graphs(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE


@pytest.mark.parametrize(
    "options",
    [
        {"splitting_ops": []},
        {"splitting_ops": ["vllm::unified_attention_with_output"]},
        {"use_inductor_graph_partition": True},
        {"mode": CompilationMode.DYNAMO_TRACE_ONCE},
    ],
    ids=["not split", "not split at the update", "split by inductor", "compiled in one piece"],
)
def test_graphs_of_a_model_that_is_not_split_around_attention_are_refused(options: dict[str, Any]) -> None:
    config = compilation(CUDAGraphMode.FULL_DECODE_ONLY, **options)
    with pytest.raises(ConfigError, match="--enforce-eager"):
        limit_graphs(config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    limit_graphs(config)


def test_a_model_that_is_not_compiled_has_no_graphs_with_a_window() -> None:
    config = compilation(CUDAGraphMode.FULL_DECODE_ONLY, mode=CompilationMode.NONE)
    limit_graphs(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


def test_graphs_that_break_at_run_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They break at attention and not at the update of keys and values."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_BREAKABLE_CUDAGRAPH"):
        limit_graphs(compilation(CUDAGraphMode.PIECEWISE))


@pytest.mark.parametrize("keeper", ["cudagraph_manager", "cudagraph_dispatcher"])
def test_a_runner_with_full_graphs_is_refused(keeper: str) -> None:
    full = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    assert "--enforce-eager" in check_runner(SimpleNamespace(**{keeper: full}))
    pieces = SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE)
    assert check_runner(SimpleNamespace(**{keeper: pieces})) == ""


def config(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "parallel_config": SimpleNamespace(
            use_ubatching=False, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        "model_config": SimpleNamespace(runner_type="generate"),
        "scheduler_config": SimpleNamespace(async_scheduling=True),
        "speculative_config": None,
        "use_v2_model_runner": True,
    }
    for path, value in changes.items():
        part, _, name = path.partition("__")
        values[part] = SimpleNamespace(**{**vars(values[part]), name: value}) if name else value
    return SimpleNamespace(**values)


NGRAM = SimpleNamespace(method="ngram")


def test_vllms_defaults_are_taken() -> None:
    check_window(config(), SimpleNamespace(lend_bytes=0))  # type: ignore[arg-type]
    exact = config(speculative_config=NGRAM, use_v2_model_runner=False, scheduler_config__async_scheduling=False)
    check_window(exact, SimpleNamespace(lend_bytes=0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"speculative_config": NGRAM}, "--speculative-config"),
        (
            {
                "speculative_config": SimpleNamespace(method="eagle"),
                "use_v2_model_runner": False,
                "scheduler_config__async_scheduling": False,
            },
            "--speculative-config",
        ),
    ],
)
def test_what_a_window_does_not_work_with_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_window(config(**changes), SimpleNamespace(lend_bytes=0))  # type: ignore[arg-type]


def test_lending_is_refused() -> None:
    with pytest.raises(ConfigError, match="POLDER_LEND"):
        check_window(config(), SimpleNamespace(lend_bytes=1))  # type: ignore[arg-type]
