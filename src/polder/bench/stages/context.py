"""How long can a context be, and what does a token of it cost? Contexts grow until an arm refuses.

Each answer, prompt and decoded tokens, is compared with that of the arm `enough`, stock with memory for all of it. What
copies of windowed blocks should cost is planned from what `enough` takes for the same context
(planner/context_cost): each layer's windowed blocks arrive before its attention, in the window's order, at the rate
and with the cost that the engine measured at its start.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from polder.bench.harness.arms import Arm
from polder.bench.harness.control import engine_status
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.engines import BLOCK_TOKENS
from polder.bench.harness.progress import Update
from polder.bench.harness.runs import ask
from polder.bench.report.metrics import Metrics, percentile, tbts_ms, ttfts_ms
from polder.bench.workloads.tenants import VOCAB
from polder.bench.workloads.traces import drawn_prompt
from polder.errors import EnvironmentFault
from polder.metrics import WINDOW_POINTS
from polder.planner.context_cost import Stream, even_step_seconds
from polder.window.regions import WindowShape

__all__ = ["OUTPUT_TOKENS", "Contexts", "Shape", "planned_tbt_ms", "planned_ttft_ms"]

OUTPUT_TOKENS = 64
SHORT_TOKENS = 4 * BLOCK_TOKENS


class Answer(NamedTuple):
    tokens: list[int]
    ttft_ms: float
    tbt_ms: float
    """Median."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an arm has room for, and what it streams. Stock has a window of all layers."""

    window: WindowShape
    units: int
    """Held at all times."""
    unit_blocks: int
    batched_tokens: int
    block_bytes: float
    """Bytes of one block in one layer."""

    @property
    def longest(self) -> int:
        """Tokens of the longest context, prompt and output."""
        return (self.window.most(self.units) * self.unit_blocks - 1) * BLOCK_TOKENS

    def windowed_blocks(self, tokens: int) -> int:
        """Blocks of a context that is alone for which the regular units have no room."""
        return self.window.windowed_blocks(-(-(tokens + 1) // BLOCK_TOKENS), self.units, self.unit_blocks)


class Contexts:
    """Asks the arms, one context at a time, `enough` before all others."""

    def __init__(self, engine: str, seed: int) -> None:
        self.found: dict[str, Metrics] = {}
        """Arm -> metrics."""
        self._engine, self._seed = engine, seed
        self._expected: dict[int, Answer] = {}
        """Tokens of a context -> the answer of `enough`."""

    def grow(self, name: str, arm: Arm, lengths: Sequence[int], shape: Shape) -> Iterator[int]:
        """The arm at its lengths. Yields each once it was measured."""
        found = self.found.setdefault(name, {})
        compared = different = 0
        self._ask(arm, SHORT_TOKENS, entropy=1)  # all code has run once
        for length in lengths:
            answer = self._ask(arm, length, entropy=0)
            found[f"ttft_{length}_ms"], found[f"tbt_{length}_ms"] = answer.ttft_ms, answer.tbt_ms
            if name == "enough":
                self._expected[length] = answer
            else:
                compared += 1
                different += answer.tokens != self._expected[length].tokens
                found["context_tokens"] = float(length)
                found[f"windowed_{length}_blocks"] = float(shape.windowed_blocks(length - OUTPUT_TOKENS // 2))
            yield length
        found["answers_compared"], found["answers_different"] = float(compared), float(different)
        # One block more is refused, and a short request served after it.
        found["refused_beyond"] = float(bool(self._play(arm, lengths[-1] + BLOCK_TOKENS, entropy=2).error))
        self._ask(arm, SHORT_TOKENS, entropy=3)

    def plan(self, name: str, arm: Arm, length: int, shape: Shape, enough: Arm) -> None:
        """What the copies should cost, by the engine's own measurements, beside what was measured."""
        assert arm.broker is not None
        stream = _measured_stream(engine_status(arm.broker, self._engine).stats, shape)
        found, stock = self.found[name], {n: answer.ttft_ms for n, answer in self._expected.items()}
        found["windowed_step_more_ms"] = 1e3 * max((more_s for _, more_s in stream.least_s), default=0.0)
        found["link_bytes_per_s"], found["layer_overhead_us"] = stream.link_bytes_per_s, 1e6 * stream.overhead_s
        found["contention_s_per_gb"] = 1e9 * stream.contention_s_per_byte
        step_ms = self._ask(enough, length, entropy=0).tbt_ms  # now: the machine changes with what others do
        found[f"enough_tbt_{length}_ms"] = step_ms
        found[f"planned_ttft_{length}_ms"] = planned_ttft_ms(shape, stream, length, stock)
        found[f"planned_tbt_{length}_ms"] = planned_tbt_ms(shape, stream, length, step_ms)

    def alternate(self, arms: Mapping[str, Arm], length: int, *, samples: int, update: Update) -> None:
        """TTFT of the arms in turn at one length, a new prompt each."""
        times: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(samples):
            for name in list(arms)[:: -1 if number % 2 else 1]:
                time.sleep(arms[name].quiet_s)
                times[name].append(self._ask(arms[name], length, entropy=10 + number).ttft_ms)
            update(number + 1, samples)
        for name, ttfts in times.items():
            self.found[name]["ttft_stocks_longest_ms"] = statistics.median(ttfts)

    def _ask(self, arm: Arm, length: int, *, entropy: int) -> Answer:
        """Raises EnvironmentFault when the request fails."""
        record = self._play(arm, length, entropy=entropy)
        if record.error:
            raise EnvironmentFault(f"{arm.name}: a context of {length} tokens failed: {record.error}")
        return Answer(record.output_ids, percentile(ttfts_ms([record]), 50), percentile(tbts_ms([record]), 50))

    def _play(self, arm: Arm, length: int, *, entropy: int) -> RequestRecord:
        prompt = drawn_prompt(length - OUTPUT_TOKENS, (self._seed, length, entropy), VOCAB)
        return ask(arm, self._engine, prompt, OUTPUT_TOKENS)


def _measured_stream(stats: Mapping[str, float], shape: Shape) -> Stream:
    """What an engine measured at its start, from its counters."""
    steps = [
        (stats[f"window_measured_{point}_blocks"] * shape.block_bytes, stats[f"window_measured_{point}_seconds"])
        for point in WINDOW_POINTS
        if f"window_measured_{point}_blocks" in stats
    ]
    return Stream(
        link_bytes_per_s=stats["window_link_bytes_per_second"],
        window_layers=shape.window.window_layers,
        overhead_s=stats["window_layer_seconds"],
        contention_s_per_byte=stats["window_contention_seconds_per_byte"],
        least_s=tuple(sorted(steps)),
    )


def planned_tbt_ms(shape: Shape, stream: Stream, length: int, step_ms: float) -> float:
    """A decode step in the middle of the answer. `step_ms`: with all KV local."""
    blocks = shape.windowed_blocks(length - OUTPUT_TOKENS // 2)
    return _step_ms(shape, stream, step_ms, loaded=blocks, stored=min(1, blocks))


def planned_ttft_ms(shape: Shape, stream: Stream, length: int, ttfts_ms: Mapping[int, float]) -> float:
    """The prompt's chunks, one after the other. `ttfts_ms`: by length, with all KV local; two lengths or more.

    A chunk's computing grows with what comes before it, so the whole is a n + b n^2 in chunks, fitted to the measured
    ones.
    """
    chunks = np.array([(n - OUTPUT_TOKENS) / shape.batched_tokens for n in ttfts_ms])
    weights = 1 / np.array(list(ttfts_ms.values()))  # short ones count as much as long ones
    terms = np.stack([chunks, chunks**2], axis=1)
    (linear, square), *_ = np.linalg.lstsq(terms * weights[:, None], np.ones(len(chunks)), rcond=None)
    prompt = length - OUTPUT_TOKENS
    regular = -(-prompt // BLOCK_TOKENS) - shape.windowed_blocks(prompt)
    total = 0.0
    for start in range(0, prompt, shape.batched_tokens):
        end = min(start + shape.batched_tokens, prompt)
        first, last = start / shape.batched_tokens, end / shape.batched_tokens
        compute_ms = linear * (last - first) + square * (last**2 - first**2)
        before, after = -(-start // BLOCK_TOKENS), -(-end // BLOCK_TOKENS)
        loaded, stored = max(0, before - regular), max(0, after - max(before, regular))
        total += _step_ms(shape, stream, compute_ms, loaded=loaded, stored=stored)
    return float(total)


def _step_ms(shape: Shape, stream: Stream, compute_ms: float, *, loaded: int, stored: int) -> float:
    """`loaded`, `stored`: blocks of a layer."""
    load_bytes, store_bytes = loaded * shape.block_bytes, stored * shape.block_bytes
    step_s = even_step_seconds(
        compute_ms / 1e3, shape.window.layers, stream, load_bytes=load_bytes, store_bytes=store_bytes
    )
    return 1e3 * step_s
