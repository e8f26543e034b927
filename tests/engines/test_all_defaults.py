"""Everything that Polder does, on two engines with all of vLLM's GPU defaults at once (tests/rig): every answer is stock's.

In each round the engines' KV memory shrinks, grows and moves while requests run, blocks go to the tiers and come back, memory is
lent and taken back, weights leave and return, and the two models take turns. Prompts are new in each round.

One round with room for 16 sequences takes a minute of CPU time. Many rounds, and engines with more sequences, are for runs by hand:

    POLDER_ROUNDS=5 POLDER_SEQUENCES=32,64,256 pytest tests/engines/test_all_defaults.py -s

`-s` shows what happened how often. A start with 256 sequences takes minutes, for kernels are interpreted here.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from polder.broker.client import request
from polder.broker.transport import Channel
from polder.broker.wire import Grant, Grown, Hello, Recall, Returned, Sleep, Welcome
from polder.errors import BrokerUnavailable
from tests.engines.conftest import Stock
from tests.engines.harness import (
    PAGE,
    ROUNDS,
    SMALL_A,
    SMALL_B,
    SMALL_VOCABULARY,
    Broker,
    Engine,
    prompts,
    tokens_of,
    wait_for,
)

SEQUENCES = [int(number) for number in os.environ.get("POLDER_SEQUENCES", "16").split(",")]
LIKE = "v2,async,uni,warmup,compiled,graphs"

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200 + 600 * ROUNDS)]

RECIPES = {"a": SMALL_A, "b": SMALL_B}
UNIT_PAGES, WEIGHT_PAGES = 4, 16
A_UNITS, B_UNITS = 32, 24
"""The most that each can hold."""
PAGES = 2 * WEIGHT_PAGES + UNIT_PAGES * (A_UNITS + B_UNITS) + 32
LOT_BYTES = 4 * 65536
"""A block of 32 tokens."""


def size(units: int) -> str:
    return f"{units * UNIT_PAGES * PAGE}B"


SETTINGS = {
    "a": {
        "POLDER_TIERS": "peer,host",
        "POLDER_HOST": f"{600 * PAGE}B",
        "POLDER_KV_SHARE": size(8),
        "POLDER_KV_CEILING": size(A_UNITS),
    },
    "b": {"POLDER_LEND": size(12), "POLDER_KV_SHARE": size(12), "POLDER_KV_CEILING": size(B_UNITS)},
}


class Ballast(threading.Thread):
    """An engine in the broker's eyes, named c. It holds as many pages as it is pinned to, and so decides what is left."""

    def __init__(self, socket: Path) -> None:
        super().__init__(daemon=True)
        self._channel = Channel(socket, timeout_s=3600.0)
        self._held: list[int] = []
        hello = Hello(
            engine="c",
            model="c",
            devices=["cpu:0"],
            page_bytes=0,
            pages_per_unit=1,
            unit_tokens=1,
            floor_units=1,
            ceiling_units=PAGES,
            share_units=1,
        )
        self._channel.send(hello)
        self.start()

    def run(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if isinstance(message, Welcome | Grant):
                    self._held += message.held.kv[0] if isinstance(message, Welcome) else message.pages[0]
                    self._channel.send(Grown(lease=message.lease))
                elif isinstance(message, Recall):
                    back, self._held = self._held[: message.units], self._held[message.units :]
                    self._channel.send(Returned(lease=message.lease, use="kv", pages=[back]))
        except BrokerUnavailable:
            pass

    def stop(self) -> None:
        self._channel.shutdown()
        self.join()
        self._channel.close()


@dataclass
class Fleet:
    """Two engines, what stock vLLM answers in their place, and what has been compared so far."""

    broker: Broker
    ballast: Ballast
    engines: dict[str, Engine]
    stock: Stock
    counts: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=lambda: count(500))
    more_seeds: Iterator[int] = field(default_factory=lambda: count(10_000))
    """Of what is asked until something happens, so that all else is the same in every run."""

    def fresh(self, number: int, length: int) -> list[list[int]]:
        """Prompts that nobody has seen."""
        return prompts(number, length, seed=next(self.seeds), vocabulary=SMALL_VOCABULARY)

    def more(self, number: int, length: int) -> list[list[int]]:
        return prompts(number, length, seed=next(self.more_seeds), vocabulary=SMALL_VOCABULARY)

    def expected(self, name: str, asked: list[list[int]], tokens: int | list[int]) -> list[list[int]]:
        """Stock's answers, which vary."""
        return self.stock(RECIPES[name], asked, tokens)

    def ask(
        self, name: str, asked: list[list[int]], tokens: int | list[int], events: dict[int, Any] | None = None
    ) -> list[list[int]]:
        """Asks an engine and compares. Returns stock's answers."""
        expected = self.expected(name, asked, tokens)
        answers = tokens_of(self.engines[name].generate(asked, tokens, events))
        self.counts["answers"] += len(answers)
        for number, (answer, right) in enumerate(zip(answers, expected, strict=True)):
            if answer != right:
                at = next(i for i, pair in enumerate(zip(answer, right, strict=True)) if pair[0] != pair[1])
                self.differing.append(f"{name}: prompt {number} of {len(asked[number])} tokens, from token {at} on")
        return expected

    def figures(self, name: str) -> Counter[str]:
        """Counters; checks all laws."""
        return Counter(self.engines[name].utility("polder_check"))

    def forget(self) -> None:
        """a's own prefix cache has nothing any more; the tiers have."""
        wait_for(lambda: bool(self.engines["a"].utility("polder_forget_local")), "no block to be in use")

    def resize(self, name: str, units: int) -> None:
        self.broker.pin(name, units)
        wait_for(lambda: self.broker.engine(name).held_units == units, f"{name} to hold {units} units")

    def leave(self, pages: int) -> None:
        """Nobody is pinned any more, and so much of the device is left to a and b."""
        for name in self.engines:
            self.broker.pin(name, 0)
        self.resize("c", PAGES - pages)


def blocks_move(fleet: Fleet) -> None:
    """Blocks of running requests move. The next turns find them in the engine's own cache, the turns after those in a tier."""
    asked, lengths = fleet.fresh(8, 100), [4, 48] * 4
    fleet.resize("a", A_UNITS)
    events = {
        12: lambda: fleet.resize("a", 14),
        20: lambda: fleet.resize("a", A_UNITS),
        30: lambda: fleet.resize("a", 9),
    }
    answers = fleet.ask("a", asked, lengths, events)
    turns = [prompt + answer for prompt, answer in zip(asked[1::2], answers[1::2], strict=True)]
    for forget in (lambda: None, fleet.forget):
        forget()
        fleet.ask("a", [[*turn, *tail] for turn, tail in zip(turns, fleet.fresh(4, 5), strict=True)], 16)


def memory_is_lent_and_taken_back(fleet: Fleet) -> None:
    """a's blocks go into memory that b does not need, are read from there, and b takes it back for requests of its own."""
    for name, units in (("a", A_UNITS), ("b", B_UNITS)):
        fleet.resize(name, units)
    wait_for(lambda: fleet.figures("b")["lent_offered_bytes"] >= 12 * LOT_BYTES, "b to lend")
    asked: list[list[int]] = []

    def stored() -> bool:
        """It looks for lenders once a second."""
        asked[:] = fleet.more(3, 150)
        before = fleet.figures("a")["tier_peer_stored_bytes_total"]
        fleet.ask("a", asked, 2)
        fleet.ask("a", fleet.more(1, 20), 1)
        return fleet.figures("a")["tier_peer_stored_bytes_total"] >= before + 12 * LOT_BYTES

    wait_for(stored, "blocks to be lent")
    fleet.forget()
    fleet.ask("a", asked, 16)
    fleet.ask("b", fleet.fresh(10, 160), 24)
    fleet.forget()
    fleet.ask("a", asked, 24)


def memory_flows_by_demand(fleet: Fleet) -> None:
    """a has more than its share until b has requests, for which requests of a are preempted."""
    fleet.leave(2 * WEIGHT_PAGES + 20 * UNIT_PAGES)

    def burst() -> None:
        wait_for(lambda: fleet.broker.engine("a").borrowed_units > 0, "a to borrow")
        fleet.ask("b", fleet.fresh(6, 160), 24)

    before = fleet.broker.engine("a").recalled_units
    fleet.ask("a", fleet.fresh(10, 100), 40, {8: burst})
    fleet.counts["units recalled for requests"] += fleet.broker.engine("a").recalled_units - before
    fleet.leave(PAGES - 1)


def models_sleep_and_wake(fleet: Fleet) -> None:
    """By an operator's word, and by the next request."""
    for name in fleet.engines:
        fleet.forget()
        request(fleet.broker.socket, Sleep(engine=name))
        wait_for(lambda name=name: fleet.broker.engine(name).asleep, f"{name} to sleep")  # type: ignore[misc]
        fleet.ask(name, fleet.fresh(2, 60), 16)


def models_take_turns(fleet: Fleet) -> None:
    """The device has room for the weights of one."""
    floor = max(fleet.broker.engine(name).floor_units for name in fleet.engines)
    before = sum(fleet.figures(name)["wakes_total"] for name in fleet.engines)
    fleet.leave(WEIGHT_PAGES + (floor + 1) * UNIT_PAGES + WEIGHT_PAGES // 2)
    for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
        fleet.ask(name, fleet.fresh(2, 40), 16)
        assert fleet.broker.engine(other).asleep
    fleet.counts["turns"] += int(sum(fleet.figures(name)["wakes_total"] for name in fleet.engines) - before)
    fleet.leave(PAGES - 1)


@pytest.fixture(params=SEQUENCES)
def fleet(request: pytest.FixtureRequest, stock: Stock) -> Iterator[Fleet]:
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=PAGES, host_pages=600).start()
        common = {"POLDER_BROKER": str(broker.socket), "POLDER_WEIGHTS": "elastic", "POLDER_LINKS": "weights=40MB/s"}
        options: dict[str, Any] = {"like": LIKE, "max_model_len": 512, "max_num_seqs": request.param}
        try:
            for name, recipe in RECIPES.items():
                own = common | SETTINGS[name] | {"POLDER_ENGINE": name}
                engines[name] = Engine.start(name, recipe, own, **options)
            ballast = Ballast(broker.socket)
            yield Fleet(broker=broker, ballast=ballast, engines=engines, stock=stock)
            ballast.stop()
        finally:
            for engine in engines.values():
                engine.stop()
            broker.stop()


def happened(fleet: Fleet) -> dict[str, float]:
    """How often each thing happened so far."""
    a, b = (fleet.figures(name) for name in "ab")
    graphs = [engine.llm.collective_rpc("graph_figures")[0] for engine in fleet.engines.values()]
    return {
        "answers": fleet.counts["answers"],
        "blocks moved": a["migrated_blocks_total"] + b["migrated_blocks_total"],
        "grows": a["grows_total"],
        "shrinks": a["shrinks_total"],
        "units recalled for requests": fleet.counts["units recalled for requests"],
        "tokens found in host memory": a["tier_host_hit_tokens_total"],
        "tokens found in b's memory": a["tier_peer_hit_tokens_total"],
        "blocks that b took back": b["lent_borrowed_recalls_total"],
        "sleeps": a["sleeps_total"] + b["sleeps_total"],
        "wakes": a["wakes_total"] + b["wakes_total"],
        "turns": fleet.counts["turns"],
        "graphs replayed": sum(each["replayed"] for each in graphs),
    }


def test_under_all_gpu_defaults_every_answer_is_stocks_whatever_moves(fleet: Fleet) -> None:
    cores = {name: engine.core_pid() for name, engine in fleet.engines.items()}
    for number in range(1, ROUNDS + 1):
        for part in (
            blocks_move,
            memory_is_lent_and_taken_back,
            memory_flows_by_demand,
            models_sleep_and_wake,
            models_take_turns,
        ):
            part(fleet)
        found = happened(fleet)
        print(json.dumps({"rounds": number, "differing": len(fleet.differing)} | found), flush=True)
        assert not fleet.differing, f"{len(fleet.differing)} of {found['answers']} answers differ"
    assert {name: engine.core_pid() for name, engine in fleet.engines.items()} == cores, "an engine has ended"
    assert all(times > 0 for times in found.values()), "not everything happened"
    assert found["turns"] >= 2 * ROUNDS
    a = fleet.figures("a")
    assert a["tier_host_corrupt_blocks_total"] + a["tier_peer_corrupt_blocks_total"] == 0
