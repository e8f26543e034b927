"""A scheduler of vLLM's own, whose window loses blocks while requests wait with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from polder.engines.vllm.core.scheduler_events import watch
from polder.engines.vllm.core.transfers import Transfers
from polder.engines.vllm.process import here
from polder.engines.vllm.rank import calls
from polder.engines.vllm.window import calls as window_calls
from polder.engines.vllm.window import runner as window_runner
from polder.engines.vllm.window.core import CoreWindow
from tests.engines.test_blocks import UNIT_BLOCKS, UNITS
from tests.engines.test_window_core import AGREEMENT, REGULAR, WINDOWED

TOKENS = AGREEMENT.block_tokens
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_hidden_layers": 4,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
}
PROMPT = [n % 97 for n in range(14 * TOKENS)]
COMMON = PROMPT[: 12 * TOKENS + 1]
"""Of 13 blocks: 7 regular ones and 6 of 8 windowed ones."""
STORED = 13 * TOKENS
"""What the tier has of the prompt."""


class Tier:
    """A connector that has a part of the prompt for `loading`. `asked`: the tokens that vLLM had by itself, each time."""

    def __init__(self, loading: str) -> None:
        self._loading = loading
        self.asked: list[int] = []

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        if request.request_id != self._loading:
            return 0, False
        self.asked.append(computed)
        return STORED - computed, True

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return ()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return False, None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Core:
    """The scheduler with a window and a tier, and workers that have computed whatever they were told to."""

    def __init__(self, folder: Path, kind: type[Scheduler] = Scheduler) -> None:
        (folder / "config.json").write_text(json.dumps(LLAMA))
        config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True),
            scheduler_config=SchedulerConfig(max_model_len=1024, is_encoder_decoder=False),
            cache_config=CacheConfig(block_size=TOKENS, enable_prefix_caching=True),
            device_config=DeviceConfig("cpu"),
        )
        spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        blocks = UNITS * UNIT_BLOCKS
        config.cache_config.num_gpu_blocks = blocks
        kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = scheduler = kind(
            vllm_config=config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(config),
            block_size=TOKENS,
        )
        self.asked_of_workers: list[tuple[Any, tuple[Any, ...]]] = []
        self.tier = scheduler.connector = Tier("loads")
        self.units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(REGULAR)), BusyBlocks.MOVE, windowed_units=WINDOWED)
        self.window = CoreWindow(scheduler, self.units, AGREEMENT, self.rpc, Transfers())
        watch(scheduler, [self.window])

    def rpc(self, function: Any, *arguments: Any) -> list[Any]:
        self.asked_of_workers.append((function, arguments))
        return [""]

    def ask(self, name: str, prompt: list[int], *, session: bool = False) -> Request:
        init_none_hash(sha256)
        request = Request(
            name,
            prompt,
            SamplingParams(max_tokens=1 if session else 20, ignore_eos=True),
            None,
            block_hasher=get_request_block_hasher(TOKENS, sha256),
            resumable=session,
        )
        request.sampling_params.update_from_generation_config({}, eos_token_id=None)
        self.scheduler.add_request(request)
        self.window.tick(0.0)
        return request

    def step(self, doubtful: list[int] | None = None, *, received: set[str] | None = None) -> Any:
        """Schedules and computes; returns the scheduler's outputs. Then the window has lost the blocks `doubtful`."""
        planned = self.scheduler.schedule()
        return self.end(planned, doubtful, received=received)

    def end(self, planned: Any, doubtful: list[int] | None = None, *, received: set[str] | None = None) -> Any:
        names = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[7] for _ in names],
            kv_connector_output=KVConnectorOutput(finished_recving=received or set()),
        )
        if doubtful:
            setattr(output, window_runner.DOUBTFUL, doubtful)
        return self.scheduler.update_from_output(planned, output)

    def blocks(self, name: str) -> list[int]:
        (found,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        return list(found)


@pytest.fixture
def core(tmp_path: Path) -> Core:
    return Core(tmp_path)


@pytest.mark.parametrize("when", ["its load is under way", "its load has ended", "it waits for room"])
def test_a_request_that_waits_with_a_lost_block_gives_all_back_and_looks_again(core: Core, when: str) -> None:
    """`loads` hits the blocks that `computes` gets in the same step, and what it has from the tier comes behind them."""
    computes = core.ask("computes", COMMON)
    loads = core.ask("loads", PROMPT)
    planned = core.scheduler.schedule()
    lost = core.units.windowed_of("computes")[:1]
    assert lost[0] in core.blocks("loads")
    assert core.tier.asked == [12 * TOKENS]
    if when == "its load is under way":
        core.end(planned, lost)
        core.step()
        assert core.tier.asked == [12 * TOKENS], "the load may still write to its blocks"
        core.step(received={"loads"})
    elif when == "its load has ended":
        core.end(planned, lost, received={"loads"})
    else:
        core.end(planned, received={"loads"})
        pool = core.scheduler.kv_cache_manager.block_pool
        room = pool.get_new_blocks(pool.get_num_free_blocks())
        planned = core.scheduler.schedule()
        assert loads.status == RequestStatus.WAITING
        assert lost[0] in core.blocks("loads")
        core.end(planned, lost)
        assert not core.blocks("loads")
        pool.free_blocks(reversed(room))
    assert computes.status == RequestStatus.PREEMPTED
    core.step()
    assert core.tier.asked == [12 * TOKENS, 0], "and nothing of what it held is found any more"
    core.step(received={"loads"})
    core.step()
    assert loads.status == RequestStatus.RUNNING
    assert loads.num_output_tokens == 1
    core.units.check_integrity()


def test_with_a_step_more_under_way_none_of_its_tokens_is_taken(tmp_path: Path) -> None:
    """Async scheduling: when the core hears of the lost blocks, a step is launched that has gone on from a wrong token."""
    core = Core(tmp_path, AsyncScheduler)
    long = core.ask("long", COMMON)
    other = core.ask("other", [5])  # keeps to one block, for `hits` needs the last one
    core.end(core.scheduler.schedule())
    assert (long.num_output_tokens, other.num_output_tokens) == (1, 1)
    spoiled = core.scheduler.schedule()
    hits = core.ask("hits", [*COMMON[:-1], 9])
    follows = core.scheduler.schedule()
    lost = core.units.windowed_of("long")[:1]
    assert lost[0] in core.blocks("hits")
    core.end(spoiled, lost)
    assert (long.status, hits.status) == (RequestStatus.PREEMPTED, RequestStatus.PREEMPTED)
    assert core.asked_of_workers[-1] == (calls.forget_outputs, (["hits", "long"],))
    resumed = core.scheduler.schedule()
    assert resumed.num_scheduled_tokens["hits"] == len(COMMON), "nothing of what it held is found any more"
    core.end(follows)
    assert (long.num_output_tokens, hits.num_output_tokens, other.num_output_tokens) == (1, 0, 3)
    core.end(resumed)
    assert hits.num_output_tokens == 1
    core.units.check_integrity()


def test_a_session_that_waits_for_input_fails_when_a_block_is_lost(core: Core) -> None:
    """It cannot start over: vLLM would go on from what is computed, which is nothing then."""
    session = core.ask("session", COMMON, session=True)
    other = core.ask("other", [5] * TOKENS)
    core.step()
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    outputs = core.step(core.units.windowed_of("session")[:1])
    told = {output.request_id: output.finish_reason for output in outputs[0].outputs}
    assert told == {"other": None, "session": FinishReason.ERROR}
    assert other.status == RequestStatus.RUNNING
    assert core.scheduler.num_waiting_for_streaming_input == 0
    core.units.check_integrity()


def test_a_request_that_loses_three_times_without_a_token_fails_and_its_client_is_told_once(core: Core) -> None:
    core.ask("long", COMMON)
    told = []
    for _ in range(4):
        planned = core.scheduler.schedule()
        outputs = core.end(planned, core.units.windowed_of("long"))
        told += [output.finish_reason for found in outputs.values() for output in found.outputs]
    assert told == [FinishReason.ERROR]
    assert not core.scheduler.requests
    core.units.check_integrity()


def test_a_model_whose_layers_read_other_layers_kv_is_refused_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(rank=0, plan=SimpleNamespace(window=object()))
    monkeypatch.setattr(here, "memory", memory)
    layers = {"a": SimpleNamespace(), "b": SimpleNamespace(kv_sharing_target_layer_name="a")}
    context = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    assert "POLDER_WINDOW" in window_calls.install(SimpleNamespace(vllm_config=context))


def test_with_a_step_more_under_way_a_request_is_given_up_as_late_as_without(tmp_path: Path) -> None:
    """Of one loss the core hears twice: with the step that lost, and with the one that was launched behind it."""
    core = Core(tmp_path, AsyncScheduler)
    core.ask("long", COMMON)
    told, losses = [], 0
    planned = core.scheduler.schedule()
    while core.scheduler.requests:
        following = core.scheduler.schedule()
        lost = core.units.windowed_of("long")
        losses += bool(lost)
        outputs = core.end(planned, lost)
        told += [output.finish_reason for found in outputs.values() for output in found.outputs]
        planned = following
    assert told == [FinishReason.ERROR]
    assert losses == 6
