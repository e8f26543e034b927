"""How long is the first token of a model that was asleep?

One engine by itself, one request at a time, from when it is sent to its first token: while the model is resident, in
stock and in Polder; after an operator put it to sleep, so that the request finds no weight on the device, with the
copies awaited layer by layer ("streamed") and as a whole ("whole"); and, what is left to do without Polder, from the
start of a new stock engine. Asleep and awake alternate, so that a slow minute of the machine falls on both. Its memory
is free when it wakes: what it costs others to give it back is in the temporal stage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from polder.bench.harness.arms import Arm
from polder.bench.harness.control import moved, put_to_sleep, wake, weight_counts
from polder.bench.harness.driver import ClosedLoop, RequestRecord, play
from polder.bench.harness.progress import Stage
from polder.bench.report.metrics import Metrics, percentile
from polder.bench.report.result import without_nan
from polder.bench.workloads.prompts import prompt_of, single
from polder.bench.workloads.tenants import VOCAB
from polder.errors import EnvironmentFault

__all__ = ["ARMS", "RESIDENT", "measure_comeback", "resident_and_reclaimed"]

ARMS = ("stock", "polder-streamed", "polder-whole", "polder-streamed-link", "polder-whole-link")
"""With copies at memcpy's speed, on the cores that compute, and with a link's."""
RESIDENT = {"stock": "stock-resident", "polder-streamed": "polder-resident"}
"""Arm -> the name of what it measures while the model is resident, for those where that counts."""
OUTPUT_TOKENS = 8


def measure_comeback(
    name: str,
    start: Callable[[], Arm],
    *,
    prompts: Sequence[int],
    anew_prompt: int,
    samples: int,
    stage: Stage,
) -> dict[str, Metrics]:
    """Figures by the name that they have in the result. `start`: starts the arm, which has one engine, and returns it
    ready.

    Raises EnvironmentFault when the engine does not answer.
    """
    found: dict[str, Metrics] = {}
    started = time.perf_counter()
    arm = start()
    if name == "stock":
        record = _ask(arm, anew_prompt, number=0)
        if record.error:
            raise EnvironmentFault(f"{arm.name} does not answer: {record.error}")
        first_token_s = time.perf_counter() - started - (record.end_s - record.token_s[0])
        found["stock-anew"] = {_metric(anew_prompt): first_token_s * 1e3}
    resident, reclaimed = resident_and_reclaimed(arm, prompts=prompts, samples=samples, stage=stage)
    if reclaimed is not None:
        found[name] = without_nan(reclaimed)
    if name in RESIDENT:
        found[RESIDENT[name]] = without_nan(resident)
    return found


def resident_and_reclaimed(
    arm: Arm, *, prompts: Sequence[int], samples: int, stage: Stage
) -> tuple[Metrics, Metrics | None]:
    """Metrics of the arm's one engine with its weights in place, and after it lost them; None where they cannot move.

    Prompts of each length in `prompts` are asked `samples` times after one that does not count. None repeats another.
    """
    broker, engine = arm.broker, arm.engines[0].name
    resident: dict[int, list[RequestRecord]] = {tokens: [] for tokens in prompts}
    reclaimed: dict[int, list[RequestRecord]] = {tokens: [] for tokens in prompts}
    before = weight_counts(broker)
    for number in range(samples + 1):
        for tokens in prompts:
            if broker is not None:
                wake(broker, engine)
            time.sleep(arm.quiet_s)
            resident[tokens].append(_ask(arm, tokens, number=2 * number))
            if broker is not None:
                time.sleep(arm.quiet_s)
                put_to_sleep(broker, engine)
                reclaimed[tokens].append(_ask(arm, tokens, number=2 * number + 1))
        stage.update(number + 1, samples + 1)
    after = weight_counts(broker)
    arm.check()
    if broker is None:
        return _metrics(resident), None
    gained = moved(before, after)[engine]
    wakes = max(1.0, gained["wakes"])
    per_wake = {
        "bytes_loaded_a_wake": gained["weights_loaded_bytes"] / wakes,
        "layers_loaded_a_wake": gained["layers_loaded"] / wakes,
        "mapping_ms_a_wake": gained["wake_seconds"] / wakes * 1e3,
    }
    return _metrics(resident), {**_metrics(reclaimed), "wakes": gained["wakes"], **per_wake}


def _ask(arm: Arm, prompt_tokens: int, *, number: int) -> RequestRecord:
    engine = arm.engines[0].name
    prompt = prompt_of(prompt_tokens, (prompt_tokens, number, 3000), vocab=VOCAB)
    load = ClosedLoop(users=[[single(engine, "comeback", prompt, output_tokens=OUTPUT_TOKENS)]])
    return asyncio.run(play({engine: (arm.endpoint, load)})).records[engine][0]


def _metrics(asked: dict[int, list[RequestRecord]]) -> Metrics:
    found: Metrics = {}
    for tokens, (_, *counted) in asked.items():
        good = [record for record in counted if not record.error]
        found[_metric(tokens)] = percentile([(r.token_s[0] - r.sent_s) * 1e3 for r in good], 50)
    found["failed_requests"] = float(sum(bool(record.error) for records in asked.values() for record in records))
    return found


def _metric(prompt_tokens: int) -> str:
    return f"ttft_{prompt_tokens}_p50_ms"
