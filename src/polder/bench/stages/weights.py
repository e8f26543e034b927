"""What it costs that weights can move: the first token of a model that was asleep, and a step that streams layers.

*Comeback.* One engine by itself, one request at a time, from when it is sent to its first token: while the model is
resident, in stock and in Polder; after an operator put it to sleep, so that the request finds no weight on the device,
with the copies awaited layer by layer ("streamed") and as a whole ("whole"); and, what is left to do without Polder,
from the start of a new stock engine. Asleep and awake alternate, so that a slow minute of the machine falls on both.
Its memory is free when it wakes: what it costs others to give it back is in the temporal stage.

*Streaming.* One request decodes, again and again, while the engine holds ever fewer segments than it has layers. A step
is the median time between two tokens. The formula (planner/rotation_cost.py) gets the step with nothing streamed and
the time of a layer's copy, both measured here, the copies at each number of segments by themselves. Copies go over an
emulated link: at memcpy's speed they would take the time of the cores that compute, which no copy engine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from polder.bench.harness.arms import REPORT_S, Arm
from polder.bench.harness.control import engine_status, obeyed
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.progress import Update
from polder.bench.harness.runs import ask
from polder.bench.report.metrics import WEIGHT_COUNTERS, Metrics, percentile, tbts_ms, without_nan
from polder.bench.workloads.tenants import VOCAB
from polder.bench.workloads.traces import drawn_prompt
from polder.broker.wire import Sleep, Stream, Wake
from polder.errors import EnvironmentFault
from polder.planner.rotation_cost import pass_seconds

__all__ = ["COMEBACK_ARMS", "RESIDENT", "formula_ms", "measure_comeback", "measure_streaming", "resident_and_reclaimed"]

COMEBACK_ARMS = ("stock", "polder-streamed", "polder-whole", "polder-streamed-link", "polder-whole-link")
"""With copies at memcpy's speed, on the cores that compute, and with a link's."""
RESIDENT = {"stock": "stock-resident", "polder-streamed": "polder-resident"}
"""Arm -> the name of what it measures while the model is resident, for those where that counts."""
COMEBACK_TOKENS = 8
"""Of each answer."""
STREAMED_PROMPT, STREAMED_TOKENS = 64, 96
SLOTS = (1, 2)


def measure_comeback(
    name: str, start: Callable[[], Arm], *, prompts: Sequence[int], anew_prompt: int, samples: int, update: Update
) -> dict[str, Metrics]:
    """Figures by the name that they have in the result. `start`: starts the arm, which has one engine, and returns it
    ready. Raises EnvironmentFault when the engine does not answer."""
    found: dict[str, Metrics] = {}
    started = time.perf_counter()
    arm = start()
    if name == "stock":
        record = _asked(arm, anew_prompt, number=0)
        if record.error:
            raise EnvironmentFault(f"{arm.name} does not answer: {record.error}")
        first_token_s = time.perf_counter() - started - (record.end_s - record.token_s[0])
        found["stock-anew"] = {f"ttft_{anew_prompt}_p50_ms": first_token_s * 1e3}
    resident, reclaimed = resident_and_reclaimed(arm, prompts=prompts, samples=samples, update=update)
    if reclaimed:
        found[name] = without_nan(reclaimed)
    if name in RESIDENT:
        found[RESIDENT[name]] = without_nan(resident)
    return found


def resident_and_reclaimed(
    arm: Arm, *, prompts: Sequence[int], samples: int, update: Update
) -> tuple[Metrics, Metrics]:
    """Metrics of the arm's one engine with its weights in place, and after it lost them; empty where they cannot move.

    Prompts of each length in `prompts` are asked `samples` times after one that does not count. None repeats another.
    """
    engine = arm.engines[0].name
    resident: dict[int, list[RequestRecord]] = {tokens: [] for tokens in prompts}
    reclaimed: dict[int, list[RequestRecord]] = {tokens: [] for tokens in prompts}
    before = arm.samples()[engine]
    for number in range(samples + 1):
        for tokens in prompts:
            if arm.broker is not None:
                obeyed(arm.broker, Wake(engine=engine))
            time.sleep(arm.quiet_s)
            resident[tokens].append(_asked(arm, tokens, number=2 * number))
            if arm.broker is not None:
                time.sleep(arm.quiet_s)
                obeyed(arm.broker, Sleep(engine=engine))
                reclaimed[tokens].append(_asked(arm, tokens, number=2 * number + 1))
        update(number + 1, samples + 1)
    after = arm.samples()[engine]
    arm.check()
    if arm.broker is None:
        return _first_tokens(resident), {}
    count = {metric: after[sample] - before[sample] for metric, sample in WEIGHT_COUNTERS.items()}
    wakes = max(1.0, count["wakes"])
    return _first_tokens(resident), {
        **_first_tokens(reclaimed),
        "wakes": count["wakes"],
        "bytes_loaded_a_wake": count["weights_loaded_bytes"] / wakes,
        "layers_loaded_a_wake": count["layers_loaded"] / wakes,
        "mapping_ms_a_wake": count["wake_seconds"] / wakes * 1e3,
    }


def _asked(arm: Arm, prompt_tokens: int, *, number: int) -> RequestRecord:
    prompt = drawn_prompt(prompt_tokens, (prompt_tokens, number, 3000), VOCAB)
    return ask(arm, arm.engines[0].name, prompt, COMEBACK_TOKENS)


def _first_tokens(asked: dict[int, list[RequestRecord]]) -> Metrics:
    found: Metrics = {}
    for tokens, (_, *counted) in asked.items():
        times_ms = [(record.token_s[0] - record.sent_s) * 1e3 for record in counted if not record.error]
        found[f"ttft_{tokens}_p50_ms"] = percentile(times_ms, 50)
    found["failed_requests"] = float(sum(bool(record.error) for records in asked.values() for record in records))
    return found


def measure_streaming(arm: Arm, engine: str, update: Update) -> Metrics:
    """Step and formula in milliseconds for each number of segments given up, and the worst error as a part of the step.

    Raises EnvironmentFault when the engine, told to hold some segments, does not, or streams nothing then.
    """
    broker = arm.broker
    assert broker is not None, "weights move through a broker"

    def copied() -> tuple[float, float]:
        """(layers copied in, seconds of copying) since the engine's start."""
        stats = engine_status(broker, engine, after_s=REPORT_S).stats
        return stats.get("weights_loads_total", 0.0), stats.get("weights_copy_seconds_total", 0.0)

    layers = engine_status(broker, engine).layers
    found: Metrics = {}
    errors: list[float] = []
    resident_ms = 0.0
    for given_up in range(layers):
        obeyed(broker, Stream(engine=engine, segments=layers - given_up))
        loads, copying_s = copied()
        prompt = drawn_prompt(STREAMED_PROMPT, (given_up, 4000), VOCAB)
        step_ms = percentile(tbts_ms([ask(arm, engine, prompt, STREAMED_TOKENS)]), 50)
        loads_after, copying_after_s = copied()
        update(given_up + 1, layers)
        found[f"step_{given_up}_ms"] = step_ms
        if given_up == 0:
            resident_ms = step_ms
            continue
        if loads_after == loads:
            raise EnvironmentFault(f"{engine} holds {layers - given_up} of {layers} segments and copies nothing")
        layer_load_s = (copying_after_s - copying_s) / (loads_after - loads)
        expected_ms = formula_ms(layers, given_up, step_ms=resident_ms, layer_load_s=layer_load_s)
        found[f"formula_{given_up}_ms"] = expected_ms
        found[f"layer_{given_up}_ms"] = layer_load_s * 1e3
        errors.append(abs(step_ms - expected_ms) / step_ms)
    obeyed(broker, Wake(engine=engine))
    return {**found, "worst_error": max(errors)}


def formula_ms(layers: int, given_up: int, *, step_ms: float, layer_load_s: float) -> float:
    """A step with `given_up` segments fewer, with the slots that make it shortest, as the engine chooses them."""
    possible = [slots for slots in SLOTS if slots <= given_up <= layers - slots]
    return min(pass_seconds(layers, given_up + slots, slots, step_ms / 1e3, layer_load_s) for slots in possible) * 1e3
