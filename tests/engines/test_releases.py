"""What Polder does about differences between vLLM's releases, beside the engine tests that run on an installed one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from polder.errors import ConfigError

pytest.importorskip("vllm")

from polder.engines.vllm.core.prefetch import Prefetch
from polder.engines.vllm.hooks import around
from polder.engines.vllm.start import taps
from polder.engines.vllm.tiers.agreement import agree_on_tiers

PLAIN = {
    "prefix_replay_tokens": 0,
    "need_mamba_block_aligned_split": False,
    "num_lookahead_tokens": 0,
    "lora_config": None,
    "ec_connector": None,
    "aux_output_connector": None,
}


@pytest.mark.parametrize(
    ("release", "given"),
    [("0.32", ("config", "specs", "memory")), ("0.33", ("config", "specs", "memory", "groups"))],
)
def test_vllm_gets_the_arguments_of_its_own_release(
    release: str, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    class Core:
        def __init__(self) -> None:
            self.input_queue = None

        def _initialize_kv_caches(self, vllm_config: Any) -> Any:
            return module.get_kv_cache_configs(*given)

        def _initialize_effective_attention_block_size(self) -> None: ...

    def stock(*arguments: Any) -> list[Any]:
        asked.append(arguments)
        return []

    def negotiate(core: Any, settings: Any, configs: Callable[..., Any], *more: Any) -> tuple[Any, str]:
        return [configs("config", "specs", memory) for memory in (1, 2)], "agreed"

    module = SimpleNamespace(get_kv_cache_configs=around(stock, taps.get_kv_cache_configs))
    started = around(Core._initialize_kv_caches, taps.initialize_kv_caches)
    monkeypatch.setattr(Core, "_initialize_kv_caches", started)
    monkeypatch.setattr(taps, "negotiate", negotiate)
    settings: list[object] = [None]
    monkeypatch.setattr(taps, "settings_of", lambda _: settings[0])

    Core()._initialize_kv_caches(None)
    assert asked == [given], "a stock engine's call is passed on"
    settings[0], core = "elastic", Core()
    core._initialize_kv_caches(None)
    assert asked[1:] == [("config", "specs", 1, *given[3:]), ("config", "specs", 2, *given[3:])]
    assert core.polder_agreement == "agreed"  # type: ignore[attr-defined]


def scheduler(**more: object) -> SimpleNamespace:
    return SimpleNamespace(**PLAIN | more, add_request=print, schedule=print)


def test_a_plain_scheduler_is_watched_in_either_release() -> None:
    for more in ({}, {"defer_async_loads": False}):
        assert Prefetch.fits(scheduler(**more))


@pytest.mark.parametrize("special", [{"aux_output_connector": object()}, {"defer_async_loads": True}])
def test_requests_that_vllm_loads_in_another_way_are_left_to_it(special: dict[str, object]) -> None:
    assert not Prefetch.fits(scheduler(**special))


def test_loads_within_a_step_are_refused_with_what_to_remove() -> None:
    transfer = SimpleNamespace(kv_load_failure_policy="fail", kv_connector_extra_config={"sync_load_budget_bytes": 1})
    caching = SimpleNamespace(enable_prefix_caching=True)
    config: Any = SimpleNamespace(kv_transfer_config=transfer, cache_config=caching)
    with pytest.raises(ConfigError, match="remove sync_load_budget_bytes from kv_connector_extra_config"):
        agree_on_tiers(config, SimpleNamespace(tiers=("host",)), *[None] * 5, lambda function: [])  # type: ignore[arg-type]
