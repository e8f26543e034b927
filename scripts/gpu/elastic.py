"""Elastic KV memory under vLLM's defaults (on a GPU: V2 runner, async scheduling, CUDA graphs): tokens while it is resized."""

from __future__ import annotations

import sys
import time

from engine import Broker, Engine, broker_for, compare, prompts, running, sizes_of, stock_answers
from stage import Stage, main


def stage(stage: Stage) -> None:
    sizes = sizes_of(stage)
    _one(stage, "small", sizes.small_units * sizes.small_unit_bytes, prompts(12, 150, seed=21), 32)
    if stage.device == "cuda" and not stage.tiny:
        _one(stage, "large", sizes.large_bytes, prompts(32, 1024, seed=22), 128)


def _one(stage: Stage, model: str, kv_bytes: int, asked: list[list[int]], tokens: int) -> None:
    expected = stock_answers(stage, model, asked, tokens)
    with broker_for(stage, kv_bytes) as broker, running(stage, model, broker.settings("a")) as engine:
        engine.ask(asked[:1], 2)
        most, floor = broker.engine("a").ceiling_units, broker.engine("a").floor_units
        few = max(floor, most // 3)
        begin = time.perf_counter()
        compare(stage, "grown on demand", model, engine.ask(asked, tokens), expected)
        stage.note(f"{model}, Polder: all answers", time.perf_counter() - begin, "s")
        sizes = (few, most, few, most, 0)
        events = {12 + 5 * at: lambda units=units: broker.resize("a", units) for at, units in enumerate(sizes)}
        compare(stage, "resized in mid-answer", model, engine.ask(asked, tokens, events), expected)
        _report(stage, model, broker, engine)


def _report(stage: Stage, model: str, broker: Broker, engine: Engine) -> None:
    found = engine.figures()
    for name in (
        "grows_total",
        "shrinks_total",
        "migrated_blocks_total",
        "preemptions_total",
        "giveback_preemptions_total",
    ):
        stage.note(f"{model}: {name}", found[name])
    for name in ("grow_max_seconds", "shrink_max_seconds"):
        stage.note(f"{model}: {name}", found[name] * 1e3, "ms")
    stage.check(f"{model}: it has shrunk", holds=found["shrinks_total"] > 0)
    stage.note(f"{model}: units held", broker.engine("a").held_units)


if __name__ == "__main__":
    sys.exit(main("elastic", stage))
