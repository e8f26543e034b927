"""How long is a step of a model that streams some of its layers, beside what the formula says?

One request decodes, again and again, while the engine holds ever fewer segments than it has layers. A step is the
median time between two tokens. The formula (planner/rotation_cost.py) gets the step with nothing streamed and the time
of a layer's copy, both measured here, the copies at each number of segments by themselves.

Copies go over an emulated link: at memcpy's speed they would take the time of the cores that compute, which no device's
copy engine does.
"""

from __future__ import annotations

import asyncio

from polder.bench.harness.arms import Arm
from polder.bench.harness.control import REPORT_S, engine_status_soon, hold, wake
from polder.bench.harness.driver import ClosedLoop, play
from polder.bench.harness.progress import Stage
from polder.bench.report.metrics import Metrics, percentile, tbts_ms
from polder.bench.workloads.prompts import prompt_of, single
from polder.bench.workloads.tenants import VOCAB
from polder.errors import EnvironmentFault
from polder.planner.rotation_cost import pass_seconds

__all__ = ["formula_ms", "measure_streaming"]

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 96
SLOTS = (1, 2)


async def measure_streaming(arm: Arm, engine: str, *, stage: Stage) -> Metrics:
    """Step and formula in milliseconds for each number of segments given up, and the worst error as a part of the step.

    Raises EnvironmentFault when the engine, told to hold some segments, does not, or streams nothing then.
    """
    assert arm.broker is not None, "weights move through a broker"
    layers = (await engine_status_soon(arm.broker, engine)).layers
    found: Metrics = {}
    errors: list[float] = []
    resident_ms = 0.0
    for given_up in range(layers):
        await asyncio.to_thread(hold, arm.broker, engine, layers - given_up)
        loads, copying_s = await _copied(arm, engine)
        step_ms = await _step_ms(arm, engine, given_up)
        loads_after, copying_after_s = await _copied(arm, engine)
        found[f"step_{given_up}_ms"] = step_ms
        stage.update(given_up + 1, layers)
        if not given_up:
            resident_ms = step_ms
            continue
        if loads_after == loads:
            raise EnvironmentFault(f"{engine} holds {layers - given_up} of {layers} segments and copies nothing")
        layer_load_s = (copying_after_s - copying_s) / (loads_after - loads)
        expected_ms = formula_ms(layers, given_up, step_ms=resident_ms, layer_load_s=layer_load_s)
        found[f"formula_{given_up}_ms"] = expected_ms
        found[f"layer_{given_up}_ms"] = layer_load_s * 1e3
        errors.append(abs(step_ms - expected_ms) / step_ms)
    await asyncio.to_thread(wake, arm.broker, engine)
    return {**found, "worst_error": max(errors)}


def formula_ms(layers: int, given_up: int, *, step_ms: float, layer_load_s: float) -> float:
    """A step with `given_up` segments fewer, with the slots that make it shortest, as the engine chooses them."""
    possible = [slots for slots in SLOTS if slots <= given_up <= layers - slots]
    return min(pass_seconds(layers, given_up + slots, slots, step_ms / 1e3, layer_load_s) for slots in possible) * 1e3


async def _step_ms(arm: Arm, engine: str, number: int) -> float:
    prompt = prompt_of(PROMPT_TOKENS, (number, 4000), vocab=VOCAB)
    load = ClosedLoop(users=[[single(engine, "streaming", prompt, output_tokens=OUTPUT_TOKENS)]])
    return percentile(tbts_ms((await play({engine: (arm.endpoint, load)})).records[engine]), 50)


async def _copied(arm: Arm, engine: str) -> tuple[float, float]:
    """(layers copied in, seconds of copying) since the engine's start."""
    assert arm.broker is not None
    stats = (await engine_status_soon(arm.broker, engine, after_s=REPORT_S)).stats
    return stats.get("weights_loads_total", 0.0), stats.get("weights_copy_seconds_total", 0.0)
