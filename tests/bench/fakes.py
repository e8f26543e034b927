"""Arms without processes over a fake server, a broker whose engines obey at once, and traces of a few short requests."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as changed

from polder.bench.harness import control
from polder.bench.harness.arms import Arm, ArmSpec
from polder.bench.harness.driver import Endpoint
from polder.bench.harness.engines import EnginePlan
from polder.bench.harness.scrape import TIER_HITS, Sample
from polder.bench.stages import equality, resize, restart, streaming
from polder.bench.workloads import agents, tenants
from polder.broker import client
from polder.broker.wire import Done, Resize, Sleep, Status, Stream, Wake
from tests.bench.fake_server import FakeEngine, serving
from tests.serve.fakes import canned_status, engine_status

LAYERS = 4


class FakeBroker:
    """Stands for the client module: sizes, sleep, wakes and segments are as ordered; streamed layers are copied in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Resize | Sleep | Wake | Stream] = []
        self.obeys = True
        self.held_units, self.segments = 10, LAYERS
        self.stats = dict.fromkeys(
            [
                *equality.MOVE_COUNTERS.values(),
                *control.WEIGHT_COUNTERS.values(),
                *("grow_seconds_total", "shrink_seconds_total", "weights_copy_seconds_total"),
            ],
            0.0,
        )
        self.stats |= dict.fromkeys(("window_layer_seconds", "window_contention_seconds_per_byte"), 0.0)
        self.stats["window_link_bytes_per_second"] = 1e9
        monkeypatch.setattr(client, "request", self.request)
        monkeypatch.setattr(client, "status", self.status)

    def count(self, **more: float) -> None:
        for name, value in more.items():
            self.stats[f"{name}_total"] += value

    def request(self, _: Path, message: Resize | Sleep | Wake | Stream) -> Done:
        self.asked.append(message)
        if not self.obeys:
            return Done()
        if isinstance(message, Resize) and message.units:
            grows = message.units > self.held_units
            moves = {"migrated_blocks": 1, "evicted_blocks": 1, "preemptions": 1, "shrinks": 1, "shrink_seconds": 0.01}
            self.count(**({"grows": 1, "grow_seconds": 0.01} if grows else moves))
            self.held_units = message.units
        elif isinstance(message, Sleep):
            self.segments = 0
            self.count(sleeps=1)
        elif isinstance(message, Wake) and not self.segments:
            self.segments = LAYERS
            self.count(wakes=1, weights_loads=LAYERS)
        elif isinstance(message, Wake | Stream):
            self.segments = message.segments if isinstance(message, Stream) else LAYERS
        return Done()

    def status(self, _: Path) -> Status:
        if 0 < self.segments < LAYERS:
            self.count(weights_loads=1, weights_copy_seconds=0.001)
        engine = engine_status(
            "A",
            held_units=self.held_units,
            layers=LAYERS,
            segments=self.segments,
            asleep=not self.segments,
            weights_reason="for a test",
            stats=dict(self.stats),
        )
        return changed(canned_status(), engines=[changed(engine, engine=name) for name in ("A", "B", "T2", "long")])


class FakeArm(Arm):
    """One server for all of its engines; it refuses what is longer than they take."""

    quiet_s = 0.0

    def __init__(self, name: str, spec: ArmSpec, logs: Path, journal: list[str], **behaviour: Any) -> None:
        super().__init__(name, spec.engines, logs)
        longest = max((engine.max_model_len for engine in spec.engines), default=10**9)
        self.engine = FakeEngine(**({"longest": longest, "cached_tokens": 48} | behaviour))
        self._system, self._journal, self._server = spec.system, journal, ExitStack()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(base_url=self.engine.url)

    @property
    def broker(self) -> Path | None:
        return Path("broker") if self._system == "polder" else None

    def start(self) -> None:
        self._journal.append(self.name)
        self._server.enter_context(serving(self.engine))

    def wait_ready(self) -> None: ...

    def check(self) -> None: ...

    def stop(self) -> None:
        self._journal.append(f"stop {self.name}")
        self._server.close()

    def engine_url(self, engine: str) -> str:
        return self.engine.url

    def reset_prefix_caches(self) -> None: ...

    def preemptions(self) -> dict[str, float]:
        return {engine.name: 0.0 for engine in self.engines}

    def samples(self) -> dict[str, dict[str, Sample]]:
        hits = Sample(value=16.0 * len(self.engine.asked), kind="counter")
        return {engine.name: {TIER_HITS: hits} for engine in self.engines}


def one_engine(name: str = "T2", **more: Any) -> EnginePlan:
    fields = {"max_model_len": 2304, "core": 0, "share_bytes": 48 << 20, "recipe": tenants.TENANTS["T2"]}
    return EnginePlan(name=name, model_path=Path("/models") / name, **(fields | more))


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for reports or rests between rounds; no model is built."""
    for module in (control, equality, streaming):
        monkeypatch.setattr(module, "REPORT_S", 0.0)
    monkeypatch.setattr(resize, "PAUSE_S", 0.001)
    monkeypatch.setattr(restart, "SETTLE_S", 0.0)
    monkeypatch.setattr("polder.bench.harness.engines.ensure_model", lambda recipe, folder: folder / recipe.name)
    monkeypatch.setattr("polder.bench.suites.base.check_engine", lambda: None)


def short_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions of agents, twenty bursts, three chats, and tenants whose slots and pauses last no time."""
    short = {"input_tokens": 64, "output_tokens": 2}
    rows = [changed(row, think_s=0.0, **short) for row in agents.load_agent() if row.session < 2]
    burst = [changed(row, t=0.0, **short) for row in agents.load_burst()[:20]]
    chat = [changed(agents.load_chat()[0], t=0.0, **short)] * 3
    for name, found in (("load_agent", rows), ("load_burst", burst), ("load_chat", chat)):
        monkeypatch.setattr(agents, name, lambda found=found: found)
    monkeypatch.setattr(agents, "STAGGER_S", 0.0)
    monkeypatch.setattr(tenants, "SLOT_S", 0.001)
    monkeypatch.setattr(tenants, "PAUSE_S", (0.0, 0.001))
