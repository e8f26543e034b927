"""Requests that have their KV from a tier, and wait for room that the others of them hold. With vLLM's own scheduler, without an
engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from polder.engines.vllm.core.transfers import PATIENCE_STEPS, TierTransfers
from tests.engines.test_holders import TOKENS, UNIT, UNITS, Rig

LOADED = {"a": 12, "b": 12, "c": 11}
"""Blocks that a tier has of each request. They need one more, and 4 of 39 are left when all have been loaded."""


class Loads:
    """A connector that has the first blocks of each request once, and loads all of them in one step."""

    def __init__(self) -> None:
        self.wanted = dict(LOADED)

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        blocks = self.wanted.pop(request.request_id, 0) if not computed else 0
        return blocks * TOKENS, blocks > 0

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return ()

    def request_finished(self, request: Any, blocks: Any) -> tuple[bool, None]:
        return False, None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Waiting(Rig):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.scheduler.connector = Loads()
        self.transfers = TierTransfers(SimpleNamespace(tiers=SimpleNamespace(busy=False, prefill=None)), self.scheduler)
        for name, blocks in LOADED.items():
            # Prompts that have nothing in common.
            self.ask(name, blocks * TOKENS + 5 + ord(name) % 3, 3)
        self.step()
        assert self.holding() == {"a", "b", "c"}

    def holding(self) -> set[str]:
        return {request.request_id for request in self.scheduler.kv_holding_waiting}

    def step(self, loaded: set[str] | None = None) -> list[str]:
        planned = self.scheduler.schedule()
        names = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[7]] * len(names),
            kv_connector_output=KVConnectorOutput(finished_recving=loaded) if loaded else None,
        )
        self.scheduler.update_from_output(planned, output)
        self.transfers.between_steps(0.0)
        return names

    def finish(self) -> None:
        for _ in range(6 * PATIENCE_STEPS):
            self.step()
            if not self.scheduler.requests:
                return
        pytest.fail(f"{self.holding()} wait for ever")


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    return Waiting(tmp_path)


def test_requests_that_wait_for_each_others_room_all_end(waiting: Waiting) -> None:
    waiting.shrink(1)
    assert waiting.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    waiting.step(loaded=set(LOADED))
    assert waiting.step() == [], "each of them needs a block"
    waiting.finish()
    waiting.units.check_integrity()


def test_no_request_gives_up_what_it_has_loaded_while_others_run_or_load(waiting: Waiting) -> None:
    waiting.step(loaded={"a"})
    for _ in range(2 * PATIENCE_STEPS):
        waiting.step()
    assert waiting.holding() == {"b", "c"}


def test_a_recall_that_may_preempt_takes_the_blocks_of_those_that_wait_too(waiting: Waiting) -> None:
    waiting.step(loaded=set(LOADED))
    needed = -(-(max(LOADED.values()) + 1) // UNIT)
    done = waiting.units.shrink_preempting(UNITS, needed, lambda: None)
    assert len(done.plan.units) == UNITS - needed
    assert all(request.status != RequestStatus.WAITING_FOR_REMOTE_KVS for request in waiting.scheduler.waiting)
    waiting.finish()
    waiting.units.check_integrity()


def test_blocks_that_are_being_loaded_are_nobodys_to_take(waiting: Waiting) -> None:
    done = waiting.units.shrink_preempting(UNITS, 1, lambda: None)
    assert len(done.plan.units) == 1
    assert waiting.holding() == set(LOADED)
