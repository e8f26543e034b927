"""Whoever keeps ids of KV blocks has the right ones after blocks have moved. With vLLM's own scheduler and offloading scheduler,
without an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadPolicy,
    PrepareStoreOutput,
    RequestOffloadingContext,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from polder.engines.vllm.core.holders import BlockHolders
from polder.engines.vllm.tiers.connector import TierScheduler
from polder.errors import ConfigError, IntegrityError
from tests.engines.test_window_lost import LLAMA as MODEL

TOKENS, UNIT, UNITS = 16, 4, 10
WINDOWED = 2


class Manager:
    """Stores every block, has none to load."""

    tiers = SimpleNamespace(
        held=False, refresh=lambda: None, loadable_or_pending=lambda keys: np.zeros(0, dtype=np.int64)
    )

    def on_new_request(self, context: Any) -> Any:
        return RequestOffloadingContext(policy=OffloadPolicy.REQUEST_LEVEL)

    def lookup(self, key: Any, context: Any) -> Any:
        return LookupResult.MISS

    room = True

    def prepare_store(self, keys: Any, context: Any) -> Any:
        if not self.room:
            return None  # vLLM asks again, after the request has ended if need be
        return PrepareStoreOutput(keys_to_store=list(keys), store_spec=LoadStoreSpec(), evicted_keys=[])

    def plan_spills(self) -> list[Any]:
        return []

    def take_events(self) -> list[Any]:
        return []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Connector:
    """What vLLM's scheduler sees of PolderConnector, without an engine's workers."""

    def __init__(self, half: TierScheduler) -> None:
        self.half = half

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> Any:
        return self.half.get_num_new_matched_tokens(request, computed)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return ()

    def request_finished(self, request: Any, blocks: Any) -> tuple[bool, None]:
        self.half.request_finished(request)
        return False, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.half, name) if hasattr(TierScheduler, name) else lambda *_, **__: None


class Rig:
    """A scheduler with tiers, stepped by hand. `content[block]` is what a block's bytes are: (request, position)."""

    def __init__(self, folder: Path, windowed: int = 0) -> None:
        (folder / "config.json").write_text(json.dumps(MODEL))
        blocks = UNIT * (UNITS + windowed)
        config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True),
            scheduler_config=SchedulerConfig(max_model_len=1024, is_encoder_decoder=False),
            cache_config=CacheConfig(block_size=TOKENS, enable_prefix_caching=True),
            device_config=DeviceConfig("cpu"),
        )
        spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config.cache_config.num_gpu_blocks = blocks
        kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(config),
            block_size=TOKENS,
        )
        offloading = SimpleNamespace(
            config=SimpleNamespace(groups=[SimpleNamespace(group_id=0, tokens_per_block=TOKENS)]),
            blocks_per_chunk=1,
            tokens_per_block=(TOKENS,),
            tokens_per_hash=TOKENS,
            offload_prompt_only=False,
            get_manager=Manager,
            kv_events_config=SimpleNamespace(enable_kv_cache_events=False, self_describing_kv_events=False),
        )
        self.half = TierScheduler(offloading, config, kv)
        self.scheduler.connector = Connector(self.half)
        self.units = BlockUnits(self.scheduler, UNIT, list(range(UNITS)), BusyBlocks.MOVE, windowed_units=windowed)
        self.content: dict[int, tuple[str, int]] = {}
        self.stored: dict[tuple[str, int], tuple[str, int] | None] = {}
        init_none_hash(sha256)

    def ask(self, name: str, length: int, tokens: int) -> Request:
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True)
        parameters.update_from_generation_config({}, eos_token_id=None)
        prompt = [(i * 7 + length) % 97 for i in range(length)]
        hasher = get_request_block_hasher(TOKENS, sha256)
        request = Request(name, prompt, parameters, None, block_hasher=hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        """One step: what each store reads is noted in `stored`, and its jobs end with it."""
        planned = self.scheduler.schedule()
        names = list(planned.num_scheduled_tokens)
        for name in names:
            for at, block in enumerate(self.held(name)):
                self.content[block] = (name, at)
        for job in planned.kv_connector_metadata.store_jobs.values():
            source = job.src_spec
            for at, block in enumerate(source.block_ids.tolist(), start=int(source.block_indices[0])):
                self.stored[job.req_id, at] = self.content.get(block)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[7]] * len(names),
        )
        self.scheduler.update_from_output(planned, output)
        self.end_transfers()

    def end_transfers(self) -> None:
        for job in list(self.half._jobs):
            name = self.half._jobs[job].req_id
            status = self.half._req_status[name]
            for block in self.half._jobs[job].deferred_fence_block_ids or ():
                self.half._block_id_to_pending_jobs.pop(block, None)
            del self.half._jobs[job]
            status.transfer_jobs.discard(job)
            if status.finished_signaled and not status.transfer_jobs:
                del self.half._req_status[name]

    def held(self, name: str) -> list[int]:
        return list(self.scheduler.kv_cache_manager.get_block_ids(name)[0])

    def shrink(self, count: int) -> dict[int, int]:
        """As a recall does, bytes included: those of all blocks that were given up are gone."""
        plan = self.units.shrink(count, 1).plan
        moved = dict(zip(plan.sources.tolist(), plan.targets.tolist(), strict=True))
        self.carry(moved)
        for unit in plan.units.tolist():
            for block in range(unit * UNIT, (unit + 1) * UNIT):
                self.content.pop(block, None)
        return moved

    def carry(self, moved: dict[int, int]) -> None:
        for source, target in moved.items():
            self.content.pop(target, None)
            if source in self.content:
                self.content[target] = self.content.pop(source)

    def wrong(self) -> dict[tuple[str, int], Any]:
        """Blocks that a tier has under one's name with another's bytes, or with none."""
        return {place: found for place, found in self.stored.items() if found != place}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.units.check_integrity()


def decoding(rig: Rig, windowed: bool = False) -> Request:
    """A request whose blocks lie high, for those below were taken when it came, and are free now."""
    rig.ask("filler", 12 * TOKENS, 2)
    talk = rig.ask("talk", 3 * TOKENS + 5, 60)
    for _ in range(4):
        rig.step()
    return talk


def kept_ids(root: Any, wanted: set[int]) -> dict[str, list[int]]:
    """Walks everything that can be reached from `root`: where ids of blocks are kept in lists, arrays, sets or keys, by attribute
    name. Only attributes whose name speaks of blocks count, for any number might be an id."""
    found: dict[str, list[int]] = {}
    seen: set[int] = set()
    queue: list[tuple[str, Any]] = [("", root)]
    while queue:
        name, value = queue.pop()
        if id(value) in seen or isinstance(value, (str, bytes, type)) or callable(value):
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, dict):
            parts = [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = list(value)
        else:
            names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
            owner = type(value).__module__.split(".")[0]
            if owner in ("vllm", "polder", "tests", "types"):
                queue += [(f"{name}.{part}", getattr(value, part, None)) for part in names if part != "blocks"]
            continue
        last = name.rsplit(".", 1)[-1]
        numbers = [part for part in parts if isinstance(part, int) and not isinstance(part, bool)]
        hits = sorted(wanted.intersection(numbers))
        if hits and "block" in last and "size" not in last:
            found[name] = hits
        queue += [(name, part) for part in parts if not isinstance(part, int)]
    return found


def test_a_block_that_moved_before_it_was_full_is_stored_from_where_it_is_now(rig: Rig) -> None:
    talk = decoding(rig)
    before = rig.held("talk")
    moved = rig.shrink(UNITS - 3)
    assert set(moved) & set(before), "nothing of the request has moved: the test shows nothing"
    while talk.num_tokens < 6 * TOKENS + 2:
        rig.step()
    assert {at for name, at in rig.stored if name == "talk"} == set(range(6))
    assert rig.wrong() == {}


@pytest.mark.parametrize(("kept_units", "stored"), [(2, {3, 4}), (1, set())])
def test_blocks_of_a_request_that_has_just_ended_are_stored_from_where_they_are_or_not_at_all(
    rig: Rig, kept_units: int, stored: set[int]
) -> None:
    """They are free by then, and may move or be lost before the next step stores them. With async scheduling each request ends like
    that: its last tokens are known only after the step that would have stored them was scheduled."""
    talk = decoding(rig)
    rig.half.manager.room = False
    while talk.num_tokens < 5 * TOKENS:
        rig.step()
    talk.max_tokens = talk.num_output_tokens + 1
    rig.step()
    assert talk.is_finished()
    rig.half.manager.room = True
    rig.stored.clear()
    assert rig.shrink(UNITS - kept_units)
    rig.step()
    assert {at for _, at in rig.stored} == stored
    assert rig.wrong() == {}


def test_a_windowed_block_that_came_home_is_stored_from_there(tmp_path: Path) -> None:
    rig = Rig(tmp_path, windowed=WINDOWED)
    rig.units.shrink(UNITS - 1, 1)
    rig.units.open({UNITS: list(range(UNITS, UNITS + WINDOWED))})
    talk = rig.ask("talk", 3 * TOKENS + 5, 60)
    rig.step()
    windowed = rig.units.windowed_of("talk")
    assert windowed
    rig.units.offer(rig.units.unmapped(3))
    targets = rig.units.bring_home(windowed)
    assert targets
    rig.carry(dict(zip(windowed, targets, strict=True)))
    while talk.num_tokens < 6 * TOKENS + 2:
        rig.step()
    assert {at for name, at in rig.stored if name == "talk"} == set(range(6))
    assert rig.wrong() == {}


@pytest.mark.parametrize("told", [True, False])
def test_nobody_keeps_an_old_id_after_a_move(rig: Rig, told: bool) -> None:
    """Also somebody that nobody has thought of: all objects below the scheduler are searched. The negative control is a holder
    that is not told."""
    decoding(rig)
    if not told:
        rig.units.holders._holders.remove(rig.scheduler.connector.renumber_blocks)
    before = set(rig.held("talk"))
    assert kept_ids(rig.scheduler, before), "the search finds nothing"
    old = set(rig.shrink(UNITS - 3)) & before
    assert old
    found = kept_ids(rig.scheduler, old)
    assert bool(found) is not told, found


def test_no_block_moves_while_a_tier_copies_it(rig: Rig) -> None:
    talk = decoding(rig)
    planned = rig.scheduler.schedule()
    job = planned.kv_connector_metadata.store_jobs
    while not job:
        output = ModelRunnerOutput(req_ids=["talk"], req_id_to_index={"talk": 0}, sampled_token_ids=[[7]])
        rig.scheduler.update_from_output(planned, output)
        planned = rig.scheduler.schedule()
        job = planned.kv_connector_metadata.store_jobs
    assert talk.num_tokens
    assert rig.units.holders.in_transfer() <= set(rig.held("talk"))
    with pytest.raises(IntegrityError):
        rig.units.holders.renumber({}, lost=rig.units.holders.in_transfer())
    rig.end_transfers()
    rig.units.holders.renumber({}, lost=[])


def test_a_connector_that_keeps_ids_and_cannot_be_told_is_refused(rig: Rig) -> None:
    rig.scheduler.connector = SimpleNamespace()
    with pytest.raises(ConfigError, match="use PolderConnector"):
        BlockHolders(rig.scheduler)
