"""Arms without processes over a fake server, a broker whose engines obey at once, and traces of a few short requests."""

from __future__ import annotations

import json
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from msgspec.structs import replace as changed

from polder.bench.harness import arms
from polder.bench.harness.arms import Arm, ArmSpec
from polder.bench.harness.engines import EnginePlan, toml_text
from polder.bench.harness.scrape import PREEMPTIONS, REPORTED, TIER_HITS
from polder.bench.report.metrics import WEIGHT_COUNTERS
from polder.bench.stages import resize, restart, weights
from polder.bench.stages.equality import MOVE_COUNTERS
from polder.bench.workloads import agents, tenants
from polder.bench.workloads.models import ModelRecipe, _save_tokenizer
from polder.bench.workloads.traces import AgentRow, BurstRow, ChatRow
from polder.bench.workloads.traces import load as load_trace
from polder.bench.workloads.words import Words, load_words
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
                *(name.removeprefix(REPORTED) for name in (*MOVE_COUNTERS.values(), *WEIGHT_COUNTERS.values())),
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
        return changed(
            canned_status(),
            engines=[changed(engine, engine=name) for name in ("A", "B", "T2", "long", "docs", "chat-1.5")],
        )


class FakeArm(Arm):
    """One server for all of its engines; it refuses what is longer than they take."""

    quiet_s = 0.0

    def __init__(self, name: str, spec: ArmSpec, logs: Path, journal: list[str], **behaviour: Any) -> None:
        super().__init__(name, spec, logs, logs)
        longest = max((engine.max_model_len for engine in spec.engines), default=10**9)
        self.engine = FakeEngine(**({"longest": longest, "cached_tokens": 48} | behaviour))
        self._journal, self._server = journal, ExitStack()

    def start(self) -> None:
        self._journal.append(self.name)
        self.url = self._server.enter_context(serving(self.engine)).url
        self.urls = {engine.name: self.url for engine in self.engines}

    def wait_ready(self) -> None: ...

    def check(self) -> None: ...

    def stop(self) -> None:
        self._journal.append(f"stop {self.name}")
        self._server.close()

    def reset_prefix_caches(self) -> None: ...

    def scrape(self, engine: str) -> dict[str, float]:
        return {TIER_HITS: 16.0 * len(self.engine.asked), PREEMPTIONS: 0.0}


def one_engine(name: str = "T2", **more: Any) -> EnginePlan:
    fields = {"max_model_len": 2304, "share_bytes": 48 << 20, "recipe": tenants.TENANTS["T2"]}
    return EnginePlan(name=name, models=Path("/models"), **(fields | more))


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for reports or rests between rounds; no model is built."""
    for module in (arms, weights):
        monkeypatch.setattr(module, "REPORT_S", 0.0)
    monkeypatch.setattr(resize, "PAUSE_S", 0.001)
    monkeypatch.setattr(restart, "SETTLE_S", 0.0)
    monkeypatch.setattr("polder.bench.harness.engines.ensure_model", lambda recipe, folder: folder / recipe.name)
    monkeypatch.setattr("polder.bench.harness.arms.check_engine", lambda: None)


def short_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions of agents, twenty bursts, three chats, and tenants whose slots and pauses last no time."""
    short = {"input_tokens": 64, "output_tokens": 2}
    rows = {
        AgentRow: [changed(row, think_s=0.0, **short) for row in load_trace(AgentRow) if row.session < 2],
        BurstRow: [changed(row, t=0.0, **short) for row in load_trace(BurstRow)[:20]],
        ChatRow: [changed(load_trace(ChatRow)[0], t=0.0, **short)] * 3,
    }
    monkeypatch.setattr(agents, "load", rows.__getitem__)
    monkeypatch.setattr(agents, "STAGGER_S", 0.0)
    monkeypatch.setattr(tenants, "SLOT_S", 0.001)
    monkeypatch.setattr(tenants, "PAUSE_S", (0.0, 0.001))


def words_of(recipe: ModelRecipe) -> Words:
    """The tokenizer of a made model, without its weights: one word for each id, `t9` for 9."""
    with TemporaryDirectory() as folder:
        _save_tokenizer(recipe, Path(folder))
        return load_words(recipe.name, folder, ())


def own_fleet(folder: Path, *keys: dict[str, Any], **memory: Any) -> Path:
    """A fleet file with two made models, of which only configs and tokenizers are there, and 64 MiB of KV memory.
    `keys`: more for each model's table."""
    recipe = ModelRecipe(name="own", family="llama", layers=2, vocab=600)
    model = folder / recipe.name
    model.mkdir()
    heads = {"num_attention_heads": recipe.heads, "num_key_value_heads": recipe.kv_heads, "head_dim": recipe.head_dim}
    sizes = {"hidden_size": recipe.hidden, "intermediate_size": recipe.intermediate, "vocab_size": recipe.vocab}
    (model / "config.json").write_text(json.dumps({"num_hidden_layers": recipe.layers, **heads, **sizes}))
    _save_tokenizer(recipe, model)
    tables: list[tuple[str, dict[str, Any]]] = [("[memory]", {"device": "cpu:0", "kv_budget": "64MiB"} | memory)]
    for name, more in zip_longest(("docs", "chat-1.5"), keys, fillvalue={}):
        tables.append(("[[model]]", {"name": name, "path": recipe.name, "max_model_len": 512} | dict(more)))
    path = folder / "fleet.toml"
    path.write_text(toml_text(tables))
    return path
