"""How long is the first token of a model that was asleep?

One engine by itself, one request at a time, from when it is sent to its first token: while the model is resident, in stock and
in Polder; after an operator put it to sleep, so that the request finds no weight on the device, with the copies awaited layer by
layer ("streamed") and as a whole ("whole"); and, what is left to do without Polder, from the start of a new stock engine. Asleep
and awake alternate, so that a slow minute of the machine falls on both. Its memory is free when it wakes: what it costs others
to give it back is in the temporal stage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from polder.bench.harness.arms import Arm
from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import ClosedLoop, RequestRecord, Turn, play
from polder.bench.harness.progress import Stage
from polder.bench.harness.weights import moved, put_to_sleep, rouse, weight_counts
from polder.bench.report.metrics import Metrics, percentile
from polder.bench.workloads.tenants import prompt_of
from polder.errors import EnvironmentFault

__all__ = ["ARMS", "RESIDENT", "first_token_anew", "resident_and_reclaimed"]

ARMS = ("stock", "polder-streamed", "polder-whole", "polder-streamed-link", "polder-whole-link")
"""With copies at memcpy's speed, on the cores that compute, and with a link's."""
RESIDENT = {"stock": "stock-resident", "polder-streamed": "polder-resident"}
"""Arm -> the name of what it measures while the model is resident, for those where that counts."""
OUTPUT_TOKENS = 8
QUIET_S = 1.2
"""vLLM's processes spin for a second after their last message."""


def first_token_anew(arm: Arm, *, prompt_tokens: int, started: float) -> Metrics:
    """Asks an arm of one engine that was started at `started`, by perf_counter(), and just got ready. Raises EnvironmentFault."""
    record = _ask(arm, prompt_tokens, number=0)
    if record.error:
        raise EnvironmentFault(f"{arm.name} does not answer: {record.error}")
    first_token_s = time.perf_counter() - started - (record.end_s - record.token_s[0])
    return {_metric(prompt_tokens): first_token_s * 1e3}


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
                rouse(broker, engine)
            time.sleep(QUIET_S)
            resident[tokens].append(_ask(arm, tokens, number=2 * number))
            if broker is not None:
                time.sleep(QUIET_S)
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
    prompt = prompt_of(prompt_tokens, (prompt_tokens, number, 3000))
    body = encode_body(model=engine, prompt=prompt, output_tokens=OUTPUT_TOKENS)
    load = ClosedLoop(users=[[Turn(key="comeback", body=body, output_tokens=OUTPUT_TOKENS)]])
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
