"""`polder bench context`: how long can a context be with the same KV bytes on the device, and what does a token of it cost?

Stock holds what fits. With a window most layers of a long context lie in host memory. Contexts grow until an arm refuses; each
answer, prompt and 64 decoded tokens, is compared with that of a stock engine that has memory for all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console

from polder.bench.checks import Check
from polder.bench.context_checks import context_checks
from polder.bench.context_plan import (
    ENGINE,
    LINK_BYTES_PER_S,
    OUTPUT_TOKENS,
    ContextPlan,
    context_engine,
    window_layers_of,
)
from polder.bench.context_predict import planned_tbt_ms, planned_ttft_ms
from polder.bench.harness.arms import Arm, PolderArm, StockArm
from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import ClosedLoop, Turn, play
from polder.bench.harness.engines import BLOCK_TOKENS
from polder.bench.harness.machine import check_engine, describe_machine, describe_versions
from polder.bench.harness.pool import ArmPool
from polder.bench.harness.progress import Reporter, reporter_for
from polder.bench.report.metrics import Metrics, percentile, tbts_ms, ttfts_ms
from polder.bench.report.result import Arms, BenchResult, ratios_over, write_result
from polder.bench.workloads.tenants import prompt_of
from polder.broker.client import status
from polder.errors import EnvironmentFault
from polder.metrics import WINDOW_POINTS
from polder.planner.context_cost import Stream

__all__ = ["ContextBench"]

QUIET_S = 1.3
"""vLLM's processes spin for a second after their last message: an arm that was just used must not take another's core."""


class Answer(NamedTuple):
    tokens: list[int]
    ttft_ms: float
    tbt_ms: float
    """Median."""


class ContextBench:
    """One run of the bench."""

    def __init__(self, plan: ContextPlan, *, workdir: Path, console: Console | None = None) -> None:
        self.plan = plan
        self._console = console or Console()
        self._report: Reporter = reporter_for(self._console)
        self._workdir = workdir
        self._logs = workdir / "logs-context"
        self._found: dict[str, Metrics] = {arm: {} for arm in plan.arms}
        self._expected: dict[int, Answer] = {}
        self._different: dict[str, int] = dict.fromkeys(plan.arms, 0)
        self._compared: dict[str, int] = dict.fromkeys(plan.arms, 0)
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC)

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        """Runs all arms, writes the files, prints the tables. Raises PolderError when an engine fails."""
        from polder.bench.context_report import print_context, write_context_html

        check_engine()
        for path in filter(None, (json_file, html_file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="polder-bench-") as runtime, self._pool(Path(runtime)) as pool:
            self._lengths(pool)
            if {"stock", "window"} <= set(self.plan.arms):
                self._at_stocks_longest(pool)
        result, checks = self._result()
        write_result(result, json_file)
        if html_file is not None:
            write_context_html(html_file, result, checks)
        print_context(self._console, result, checks)
        for path in filter(None, (json_file, html_file)):
            self._report.note(f"written: {path}")
        return result

    # ------------------------------------------------------------------ stages

    def _lengths(self, pool: ArmPool) -> None:
        """Every arm at its lengths. `enough` comes first: its answers are what the others' are compared with."""
        asked = sorted({length for arm in self.plan.arms for length in self.plan.lengths(arm)})
        for name in self.plan.arms:
            with self._report.stage(f"growing contexts: {name}") as stage:
                arm = pool.get(name)
                self._ask(arm, BLOCK_TOKENS * 4, entropy=1)  # all code has run once
                lengths = asked if name == "enough" else self.plan.lengths(name)
                for number, length in enumerate(lengths):
                    self._one(arm, name, length, enough=lambda: pool.get("enough"))
                    stage.update(number + 1, len(lengths))
                self._refused(arm, name)

    def _one(self, arm: Arm, name: str, length: int, enough: Callable[[], Arm]) -> None:
        """`enough`: the arm that has all KV local, up."""
        answer = self._ask(arm, length, entropy=0)
        found = self._found[name]
        found[f"ttft_{length}_ms"], found[f"tbt_{length}_ms"] = answer.ttft_ms, answer.tbt_ms
        if name == "enough":
            self._expected[length] = answer
            return
        self._compared[name] += 1
        self._different[name] += answer.tokens != self._expected[length].tokens
        found["context_tokens"] = float(length)
        window_layers = window_layers_of(name)
        if window_layers is not None:
            blocks = self.plan.windowed_blocks(window_layers, length - OUTPUT_TOKENS // 2)
            found[f"windowed_{length}_blocks"] = float(blocks)
            if name.endswith("-link"):
                recipe = self.plan.recipe
                stream = _measured_stream(arm, window_layers, BLOCK_TOKENS * recipe.kv_bytes_per_token / recipe.layers)
                found["windowed_step_more_ms"] = 1e3 * max((more_s for _, more_s in stream.least_s), default=0.0)
                found["link_bytes_per_s"], found["layer_overhead_us"] = stream.link_bytes_per_s, 1e6 * stream.overhead_s
                found["contention_s_per_gb"] = 1e9 * stream.contention_s_per_byte
                stock = {n: answer.ttft_ms for n, answer in self._expected.items()}
                step_ms = self._ask(enough(), length, entropy=0).tbt_ms  # now: the machine changes with what others do
                found[f"enough_tbt_{length}_ms"] = step_ms
                found[f"planned_ttft_{length}_ms"] = planned_ttft_ms(self.plan, stream, length, stock)
                found[f"planned_tbt_{length}_ms"] = planned_tbt_ms(self.plan, stream, length, step_ms)

    def _refused(self, arm: Arm, name: str) -> None:
        """One block more than the arm's longest is refused, and a short request served after it."""
        records = self._play(arm, self.plan.longest(name) + BLOCK_TOKENS, entropy=2)
        self._found[name]["refused_beyond"] = float(bool(records[0].error))
        self._ask(arm, BLOCK_TOKENS * 4, entropy=3)

    def _at_stocks_longest(self, pool: ArmPool) -> None:
        """Stock and window in turn, a new prompt each."""
        length = self.plan.longest("stock")
        times: dict[str, list[float]] = {"stock": [], "window": []}
        with self._report.stage("the longest context that stock holds, in turn") as stage:
            arms = {name: pool.get(name) for name in times}
            for number in range(self.plan.samples):
                for name in list(times)[:: -1 if number % 2 else 1]:
                    time.sleep(QUIET_S)
                    times[name].append(self._ask(arms[name], length, entropy=10 + number).ttft_ms)
                stage.update(number + 1, self.plan.samples)
        for name, ttfts in times.items():
            self._found[name]["ttft_stocks_longest_ms"] = statistics.median(ttfts)

    # ------------------------------------------------------------------ plumbing

    def _ask(self, arm: Arm, length: int, *, entropy: int) -> Answer:
        """Raises EnvironmentFault when it fails."""
        records = self._play(arm, length, entropy)
        if records[0].error:
            raise EnvironmentFault(f"{arm.name}: a context of {length} tokens failed: {records[0].error}")
        ttfts, gaps = ttfts_ms(records), tbts_ms(records)
        return Answer(records[0].output_ids, percentile(ttfts, 50), percentile(gaps, 50))

    def _play(self, arm: Arm, length: int, entropy: int) -> list[Any]:
        prompt = prompt_of(length - OUTPUT_TOKENS, (self.plan.seed, length, entropy))
        body = encode_body(model=ENGINE, prompt=prompt, output_tokens=OUTPUT_TOKENS, extra={"return_token_ids": True})
        turn = Turn(key=f"{length}", body=body, output_tokens=OUTPUT_TOKENS)
        played = asyncio.run(play({ENGINE: (arm.endpoint, ClosedLoop(users=[[turn]]))}))
        return list(played.records[ENGINE])

    @contextlib.contextmanager
    def _pool(self, runtime: Path) -> Iterator[ArmPool]:
        def make(name: str) -> Arm:
            self._report.note(f"starting {name}")
            engine = context_engine(name, self.plan, self._workdir / "models")
            if window_layers_of(name) is None:
                return StockArm([engine], self._logs, name=name)
            return PolderArm([engine], self._logs, runtime, name=name)

        pool = ArmPool(make, lambda _: None, at_most=2)
        try:
            yield pool
        finally:
            pool.close()

    def _result(self) -> tuple[BenchResult, list[Check]]:
        for name in self.plan.arms:
            self._found[name] |= {
                "answers_compared": float(self._compared[name]),
                "answers_different": float(self._different[name]),
            }
        arms: Arms = {name: {"all": metrics} for name, metrics in self._found.items()}
        pairs = [
            (a, b)
            for a in self.plan.arms
            for b in ("stock", "enough")
            if a.startswith("window") and b in self.plan.arms
        ]
        ratios: dict[str, float] = {}
        for over, under in pairs:
            ratios |= ratios_over(arms, arm=over, baseline=under)
        checks = context_checks(arms, ratios, self.plan)
        result = BenchResult(
            bench="context",
            conditions=self._conditions(),
            arms=arms,
            ratios=ratios,
            checks={check.name: check.passed for check in checks},
        )
        return result, checks

    def _conditions(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "plan": {
                "name": plan.name,
                "arms": plan.arms,
                "samples": plan.samples,
                "batched_tokens": plan.batched_tokens,
            },
            "model": f"{plan.recipe.name}: {plan.recipe.layers} layers, {plan.recipe.kv_bytes_per_token} B of KV a token, float32",
            "local_kv_bytes": plan.local_bytes,
            "units": plan.units,
            "unit_tokens": plan.unit_blocks * BLOCK_TOKENS,
            "longest": {arm: plan.longest(arm) for arm in plan.arms},
            "output_tokens": OUTPUT_TOKENS,
            "link": f"{LINK_BYTES_PER_S / 1e9:g} GB/s emulated in the arms that end in -link; memcpy's speed in the others",
            "machine": describe_machine(),
            "versions": describe_versions(),
            "started": self._started_at.isoformat(timespec="seconds"),
            "total_seconds": round(time.monotonic() - self._started),
        }


def _measured_stream(arm: Arm, window_layers: int, block_bytes: float) -> Stream:
    """By the engine itself, when it started."""
    assert arm.broker is not None
    stats = next(engine.stats for engine in status(arm.broker).engines if engine.engine == ENGINE)
    steps = [
        (stats[f"window_measured_{point}_blocks"] * block_bytes, stats[f"window_measured_{point}_seconds"])
        for point in WINDOW_POINTS
        if f"window_measured_{point}_blocks" in stats
    ]
    return Stream(
        link_bytes_per_s=stats["window_link_bytes_per_second"],
        window_layers=window_layers,
        overhead_s=stats["window_layer_seconds"],
        contention_s_per_byte=stats["window_contention_seconds_per_byte"],
        least_s=tuple(steps),
    )
