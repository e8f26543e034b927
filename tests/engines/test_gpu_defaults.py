"""What every GPU user of vLLM gets: V2 runner, async scheduling, worker in the core's process, warm-up, compiled models in CUDA
graphs, whole and in pieces (tests/rig)."""

from __future__ import annotations

from dataclasses import replace

import gpulike
import pytest

from tests.engines.conftest import Stock
from tests.engines.harness import SMALL_A, Engine, prompts, tokens_of

VOCABULARY = SMALL_A.vocab
TINY = replace(SMALL_A, name="tiny-rig-f32", layers=2, seed=3)
"""Small, for interpreted kernels take about 55 ms a step, whatever the model."""
ASKED, LENGTHS = prompts(12, 150, seed=2, vocabulary=VOCABULARY), [4, 24] * 6


@pytest.mark.parametrize("like", ["v1", "graphs", "v2,graph", "late,uni"])
def test_words_that_mean_nothing_are_refused(like: str) -> None:
    with pytest.raises(ValueError, match="gpulike"):
        gpulike.environment(like)


@pytest.mark.engine
def test_a_model_is_not_compiled_and_eager_at_once() -> None:
    with pytest.raises(ValueError, match="enforce_eager=False"):
        Engine.start("gpulike", TINY, like="v2,async,uni,compiled", enforce_eager=True)


@pytest.mark.engine
def test_stock_with_all_defaults_gives_the_tokens_of_the_cpu(stock: Stock) -> None:
    engine = Engine.start("gpulike", TINY, like="v2,async,uni,warmup,compiled,graphs", num_gpu_blocks_override=160)
    try:
        config = engine.llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling
        assert config.parallel_config.distributed_executor_backend == "uni"
        assert tokens_of(engine.generate(ASKED, LENGTHS)) == stock(TINY, ASKED, LENGTHS)
        figures = engine.llm.collective_rpc("graph_figures")[0]
        sizes, pieces = 9, TINY.layers + 1  # the model is split at each attention
        assert figures["captured"] == sizes + sizes * pieces, "whole decode steps, and pieces for steps that prefill"
        assert figures["replayed"] > 15 + 10 * pieces
    finally:
        engine.stop()
