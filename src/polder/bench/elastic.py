"""`polder bench elastic`: two models under one KV budget, once in fixed halves, once elastic.

Engine A serves the agents of tiny-agent-v1 (closed loop, high reuse, wants memory), engine B another model under the
bursts of tiny-burst-v1 (open loop, no reuse, idle in between). B's trace is played once and measured; if A is not through
by then, B's trace goes on as load that is not measured, so both arms are measured on the same requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from rich.console import Console

from polder.bench.checks import Check, elastic_checks
from polder.bench.conditions import describe_bench, describe_runs
from polder.bench.harness.arms import Arm, PolderArm, StockArm
from polder.bench.harness.driver import play
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan
from polder.bench.harness.machine import check_engine, describe_machine, describe_versions, two_cores
from polder.bench.harness.progress import Reporter, reporter_for
from polder.bench.harness.runs import Run, arm_metrics, run_once
from polder.bench.plan import BUDGET_BYTES, USERS, BenchPlan
from polder.bench.report.metrics import RunRecords, quantile_ratio_interval, ttfts_ms
from polder.bench.report.result import Arms, BenchResult, ratios_over, write_result
from polder.bench.stages.equality import compare, disturbed, questions, undisturbed
from polder.bench.stages.resize import resize_under_load
from polder.bench.stages.tax import tax_intervals, tax_metrics, tax_pairs
from polder.bench.workloads.agents import agents, agents_ideal_hit_ratio, bursts, one_by_one, warm_up
from polder.bench.workloads.models import MODEL_A, MODEL_B, ModelRecipe, ensure_model

__all__ = ["ElasticBench"]

ENGINES = ("A", "B")
MAX_MODEL_LEN = {"A": 4224, "B": 1024}
"""A: the longest prompt of the trace, 3,988, and its 64 tokens, in whole blocks. B: 929 and 32."""
EQUALITY_MAX_MODEL_LEN = {"A": 2048, "B": 1024}
BURST_ROUNDS = 8
"""More than ever needed: the run ends when the last measured request has ended."""
WARM_UP_TIME_SCALE = 0.2
TAX_BLOCKS = 17
"""14 requests each: a pair of blocks takes three or four seconds."""
INTERVAL_METRICS = {"ttft_p50_ms": 50, "ttft_p90_ms": 90, "ttft_p99_ms": 99}


class ElasticBench:
    """One run of the bench. Stages add to `arms`; the result is made of them at the end."""

    def __init__(self, plan: BenchPlan, *, workdir: Path, console: Console | None = None) -> None:
        self.plan = plan
        self._console = console or Console()
        self._report: Reporter = reporter_for(self._console)
        self._workdir = workdir
        self._logs = workdir / "logs"
        self._arms: Arms = {}
        self._intervals: dict[str, tuple[float, float]] = {}
        self._runs: list[Run] = []
        self._stage_seconds: dict[str, float] = {}
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC)

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        """Runs all stages, writes the files, prints the table. Raises PolderError when an engine fails."""
        from polder.bench.elastic_report import print_report, write_html

        check_engine()
        for path in filter(None, (json_file, html_file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._timed("models"), self._report.stage("Making the models"):
            recipes = {"A": MODEL_A, "B": MODEL_B}
            exact = {name: recipe.in_float32() for name, recipe in recipes.items()}
            for recipe in (*recipes.values(), *exact.values()):
                ensure_model(recipe, self._workdir / "models")
        with TemporaryDirectory(prefix="polder-bench-") as runtime:
            self._under_load(recipes, Path(runtime))
            if "equality" in self.plan.stages:
                self._equality(exact, Path(runtime))
        result, checks = self._result()
        write_result(result, json_file)
        (self._workdir / "elastic-runs.json").write_bytes(msgspec.json.encode(self._runs))
        if html_file is not None:
            with self._report.stage("Drawing the report"):
                write_html(html_file, result, checks, self._runs)
        print_report(self._console, result, checks)
        for path in filter(None, (json_file, html_file)):
            self._report.note(f"written: {path}")
        return result

    # ------------------------------------------------------------------ stages

    def _under_load(self, recipes: dict[str, ModelRecipe], runtime: Path) -> None:
        """The stages in bf16, with the engines of both arms up from first to last: idle ones take no CPU."""
        engines = self._engines(recipes, MAX_MODEL_LEN)
        stock, polder = StockArm(engines, self._logs), PolderArm(engines, self._logs, runtime)
        with self._up(stock, polder):
            if "main" in self.plan.stages:
                self._main(stock, polder)
            if "resize" in self.plan.stages:
                with self._timed("resize"), self._report.stage("Resizing engine A under load") as stage:
                    found = asyncio.run(
                        resize_under_load(polder, stream_tokens=self.plan.resize_stream_tokens, stage=stage)
                    )
                self._arms["polder-resize"] = {"A": found}
            if "tax" in self.plan.stages:
                self._tax(stock, polder)

    def _main(self, stock: Arm, polder: Arm) -> None:
        load_a = agents(model="A", users=USERS, sessions=self.plan.sessions)
        load_b = bursts(model="B", rounds=BURST_ROUNDS)
        with self._timed("warm-up"), self._report.stage("Warming up"):
            for arm in (stock, polder):
                warm_b = bursts(model="B", time_scale=WARM_UP_TIME_SCALE)
                asyncio.run(play({"A": (arm.endpoint, warm_up(model="A", users=USERS)), "B": (arm.endpoint, warm_b)}))
        for number, letter in enumerate(self.plan.order, start=1):
            arm = stock if letter == "A" else polder
            title = f"Run {number} of {len(self.plan.order)}: {arm.name}"
            with self._timed(f"run {number} {arm.name}"), self._report.stage(title) as stage:
                self._runs.append(asyncio.run(run_once(arm, load_a, load_b, stage)))
        ideal = agents_ideal_hit_ratio(sessions=self.plan.sessions, block_tokens=BLOCK_TOKENS)
        for arm in (stock, polder):
            runs = [run for run in self._runs if run.arm == arm.name]
            self._arms[arm.name] = arm_metrics(runs, ideal_hit_ratio=ideal)
        for engine in ENGINES:
            pooled = {
                name: [
                    ms
                    for run in self._runs
                    if run.arm == name
                    for ms in ttfts_ms(RunRecords(records=run.records[engine]).good)
                ]
                for name in ("stock", "polder")
            }
            for metric, q in INTERVAL_METRICS.items():
                self._intervals[f"polder/stock:{engine}.{metric}"] = quantile_ratio_interval(
                    pooled["polder"], pooled["stock"], q=q
                )

    def _tax(self, stock: Arm, polder: Arm) -> None:
        blocks = one_by_one(model="B", blocks=TAX_BLOCKS)
        with self._timed("tax"), self._report.stage("Engine B alone, stock and elastic in turn") as stage:
            theirs, ours = asyncio.run(tax_pairs(stock, polder, blocks, rounds=self.plan.tax_rounds, stage=stage))
        self._arms["stock-alone"] = {"B": tax_metrics(theirs)}
        self._arms["polder-alone"] = {"B": tax_metrics(ours)}
        for metric, interval in tax_intervals(theirs, ours).items():
            self._intervals[f"polder-alone/stock-alone:B.{metric}"] = interval

    def _equality(self, exact: dict[str, ModelRecipe], runtime: Path) -> None:
        engines = self._engines(exact, EQUALITY_MAX_MODEL_LEN)
        asked = {
            "A": questions(model="A", count=12, longest=1200, seed=self.plan.seed),
            "B": questions(model="B", count=6, longest=700, seed=self.plan.seed),
        }
        title = "Same prompts, stock and while memory moves (float32)"
        with self._timed("equality"):
            stock = StockArm(engines, self._logs, name="stock-equality")
            with self._up(stock), self._report.stage(f"{title}: stock"):
                theirs = asyncio.run(undisturbed(stock, asked))
            polder = PolderArm(engines, self._logs, runtime, name="polder-equality")
            with self._up(polder), self._report.stage(f"{title}: polder"):
                ours, moved = asyncio.run(disturbed(polder, asked))
        self._arms["polder-equality"] = {"all": compare(theirs, ours) | moved}

    # ------------------------------------------------------------------ the result

    def _result(self) -> tuple[BenchResult, list[Check]]:
        ratios: dict[str, float] = {}
        for arm, baseline in (("polder", "stock"), ("polder-alone", "stock-alone")):
            if arm in self._arms:
                ratios |= ratios_over(self._arms, arm=arm, baseline=baseline)
        checks = elastic_checks(self._arms, ratios, self._intervals)
        result = BenchResult(
            bench="elastic",
            conditions=self._conditions(),
            arms=self._arms,
            ratios=ratios,
            checks={check.name: check.passed for check in checks},
        )
        return result, checks

    def _conditions(self) -> dict[str, Any]:
        engines = self._engines({"A": MODEL_A, "B": MODEL_B}, MAX_MODEL_LEN)
        return {
            **describe_bench(self.plan, engines),
            **describe_runs(self._runs, self._intervals),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "started": self._started_at.isoformat(timespec="seconds"),
            "stage_seconds": self._stage_seconds,
            "total_seconds": round(time.monotonic() - self._started),
        }

    # ------------------------------------------------------------------ plumbing

    def _engines(self, recipes: dict[str, ModelRecipe], max_model_len: dict[str, int]) -> list[EnginePlan]:
        return [
            EnginePlan(
                name=name,
                recipe=recipes[name],
                model_path=ensure_model(recipes[name], self._workdir / "models"),
                max_model_len=max_model_len[name],
                core=core,
                share_bytes=BUDGET_BYTES // len(ENGINES),
            )
            for name, core in zip(ENGINES, two_cores(), strict=True)
        ]

    @contextlib.contextmanager
    def _up(self, *arms: Arm) -> Iterator[None]:
        """Starts the arms together; whatever happens, nothing of them is left."""
        names = " and ".join(arm.name for arm in arms)
        try:
            with self._timed(f"start {names}"), self._report.stage(f"Starting {names}"):
                for arm in arms:
                    arm.start()
                for arm in arms:
                    arm.wait_ready()
            yield
        finally:
            for arm in arms:
                arm.stop()

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._stage_seconds[stage] = round(time.monotonic() - started, 1)
