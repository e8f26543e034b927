"""vLLM's own scheduler under a goal: prefill in pieces while others decode, whole steps while nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from polder.bench.workloads.models import ensure_model
from polder.engines.vllm.core import pacing
from polder.engines.vllm.core.pacing import LEAST_TOKENS, Pacing
from polder.engines.vllm.core.scheduler_events import watch

from .harness import A32, BLOCK_TOKENS, MODELS, environment

BUDGET = 512


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


@pytest.fixture(scope="module")
def config() -> Iterator[Any]:
    with environment({"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}):
        args = EngineArgs(
            model=str(ensure_model(A32, MODELS)),
            max_model_len=1024,
            max_num_batched_tokens=BUDGET,
            block_size=BLOCK_TOKENS,
            enforce_eager=True,
            async_scheduling=False,
            enable_prefix_caching=False,
        )
        yield args.create_engine_config()


class Engine:
    """A scheduler and a model that answers 7, in a time of its own: 10 ms and 1 ms for each token of a prompt."""

    def __init__(self, config: Any, clock: Clock) -> None:
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
        cache = KVCacheConfig(num_blocks=200, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        config.cache_config.num_gpu_blocks = 200
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
        )
        self.clock = clock
        self.number = 0

    def ask(self, tokens: int, output_tokens: int = 200) -> str:
        self.number += 1
        sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        request = Request(
            request_id=f"r{self.number}",
            prompt_token_ids=[self.number + at for at in range(tokens)],
            sampling_params=sampling,
            pooling_params=None,
        )
        self.scheduler.add_request(request)
        return request.request_id

    def step(self) -> dict[str, int]:
        """Tokens of each request in it."""
        output = self.scheduler.schedule()
        scheduled = dict(output.num_scheduled_tokens)
        prompts = sum(tokens for tokens in scheduled.values() if tokens > 1)
        self.clock.now += 0.010 + 0.001 * prompts
        requests = self.scheduler.requests
        ready = [r for r in scheduled if requests[r].num_computed_tokens >= requests[r].num_tokens]
        answer = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={name: index for index, name in enumerate(scheduled)},
            sampled_token_ids=[[7] if name in ready else [] for name in scheduled],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        self.scheduler.update_from_output(output, answer)
        return scheduled


def test_chunks_beside_a_decoding_request_keep_the_goal_and_alone_they_are_whole(config: Any, clock: Clock) -> None:
    engine, counters = Engine(config, clock), dict[str, float]()
    watch(engine.scheduler, [Pacing(engine.scheduler, 0.1105, counters)])
    first = engine.ask(600)
    assert engine.step() == {first: BUDGET}  # nobody decodes
    assert engine.step() == {first: 600 - BUDGET}
    for _ in range(4):
        assert engine.step() == {first: 1}
    second = engine.ask(700)
    chunks = []
    while (step := engine.step()).get(second) != 1:
        assert step[first] == 1
        chunks.append(step[second])
    assert sum(chunks) == 700
    assert chunks[0] == LEAST_TOKENS  # nothing was measured yet
    assert all(chunk == pytest.approx(100, abs=1) for chunk in chunks[1:-1])
    assert counters["paced_steps_total"] >= len(chunks) - 1
    assert not counters["late_steps_total"]
    assert engine.scheduler.max_num_scheduled_tokens == BUDGET


def test_an_idle_time_is_no_step(config: Any, clock: Clock) -> None:
    engine, counters = Engine(config, clock), dict[str, float]()
    watch(engine.scheduler, [Pacing(engine.scheduler, 0.1105, counters)])
    engine.ask(300, output_tokens=3)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
    clock.now += 100.0
    engine.ask(300, output_tokens=3)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
    assert not counters["late_steps_total"]


def test_a_goal_that_cannot_be_met_still_lets_prompts_through(config: Any, clock: Clock) -> None:
    engine, counters = Engine(config, clock), dict[str, float]()
    watch(engine.scheduler, [Pacing(engine.scheduler, 0.001, counters)])
    first = engine.ask(100)
    engine.step()
    second = engine.ask(300)
    steps = [engine.step() for _ in range(6)]
    assert [step.get(second) for step in steps] == [64, 64, 64, 64, 44, 1]
    assert all(step[first] == 1 for step in steps)
    assert counters["late_steps_total"] > 0
