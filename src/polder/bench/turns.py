"""`polder bench turns`: agents whose contexts outgrow their engine, with and without tiers behind its pool.

Engine A serves the agents of tiny-agent-v1 from a pool that holds about half of what they come back to. Beside it engine B, of
another model, is idle between its bursts and has KV memory to lend. Compared are plain vLLM, vLLM's own CPU offloading, and
Polder with its host tier, its peer tier, and both. Pools are fixed in all arms: only what stands behind A's pool differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from rich.console import Console

from polder.bench.checks import Check
from polder.bench.harness.driver import Workload
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan
from polder.bench.harness.machine import check_engine, describe_machine, describe_versions
from polder.bench.harness.pool import ArmPool
from polder.bench.harness.progress import Reporter, reporter_for
from polder.bench.harness.runs import Run, run_once
from polder.bench.report.result import Arms, BenchResult, ratios_over, write_result
from polder.bench.stages.restart import (
    RESTART_SUFFIXES,
    RestartPlan,
    describe_restart,
    restart_metrics,
    run_restart,
)
from polder.bench.stages.tax import tax_intervals, tax_metrics, tax_pairs
from polder.bench.turns_checks import NOREUSE_AT_A_TIME, turns_checks
from polder.bench.turns_conditions import describe_links, describe_turns, describe_turns_runs
from polder.bench.turns_equality import EQUALITY_MAX_MODEL_LEN, Answered, answer, compare_answers, rounds_of_questions
from polder.bench.turns_metrics import ratio_intervals, turns_metrics
from polder.bench.turns_plan import EQUALITY_BYTES, LOAD_BYTES, USERS, TurnsPlan, compared
from polder.bench.turns_setup import ArmSetup, arm_pool, turns_engines, warm
from polder.bench.workloads.agents import (
    agents,
    agents_ideal_hit_ratio,
    bursts,
    chats,
    chats_ideal_hit_ratio,
    unique_prompts,
    unmeasured,
)
from polder.bench.workloads.models import MODEL_A, MODEL_B

__all__ = ["TurnsBench"]

MAX_MODEL_LEN = {"A": 4224, "B": 1024}
"""A: the longest prompt of the trace, 3,988, and its 64 tokens, in whole blocks. B: 929 and 32."""
BURST_ROUNDS = 8
NOREUSE = {"requests": 120, "scale": 2, "blocks": 8}
"""Prompts of 480 tokens on average on engine A: a block takes two or three seconds."""
QUIET_S = 2.0
"""vLLM's processes spin for a second after their last message: an arm that was just used must not take another's core."""


class TurnsBench:
    """One run of the bench. Stages add to `arms`; the result is made of them at the end."""

    def __init__(self, plan: TurnsPlan, *, workdir: Path, console: Console | None = None) -> None:
        self.plan = plan
        self._console = console or Console()
        self._report: Reporter = reporter_for(self._console)
        self._workdir = workdir
        self._logs = workdir / "logs-turns"
        self._arms: Arms = {}
        self._intervals: dict[str, tuple[float, float]] = {}
        self._runs: dict[str, list[Run]] = {}
        """Name in the result -> its runs."""
        self._stage_seconds: dict[str, float] = {}
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC)

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        """Runs all stages, writes the files, prints the tables. Raises PolderError when an engine fails."""
        from polder.bench.turns_report import print_turns, write_turns_html

        check_engine()
        for path in filter(None, (json_file, html_file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        self._report.note(describe_links(self.plan))
        try:
            with TemporaryDirectory(prefix="polder-bench-") as runtime:
                if {"agents", "chat", "lender", "noreuse"} & set(self.plan.stages):
                    self._under_load(Path(runtime))
                if "restart" in self.plan.stages:
                    self._restart(Path(runtime))
                if "equality" in self.plan.stages:
                    self._equality(Path(runtime))
        finally:  # what was measured before an engine failed is not lost
            (self._workdir / "turns-runs.json").write_bytes(msgspec.json.encode(self._runs))
        result, checks = self._result()
        write_result(result, json_file)
        if html_file is not None:
            write_turns_html(html_file, result, checks)
        print_turns(self._console, result, checks)
        for path in filter(None, (json_file, html_file)):
            self._report.note(f"written: {path}")
        return result

    # ------------------------------------------------------------------ stages

    def _under_load(self, runtime: Path) -> None:
        load_b = bursts(model="B", rounds=BURST_ROUNDS)
        setup = ArmSetup(
            engines=self._engines(),
            sizes=LOAD_BYTES,
            links=self.plan.links,
            log_dir=self._logs,
            runtime_dir=runtime,
        )
        with arm_pool(setup, at_most=2, prepare=warm, say=self._report.note) as pool:
            # First, because it needs the two arms up together that the first runs of the agents need too.
            if "noreuse" in self.plan.stages:
                self._noreuse(pool)
            if "agents" in self.plan.stages:
                sessions = self.plan.sessions
                ideal = agents_ideal_hit_ratio(sessions=sessions, block_tokens=BLOCK_TOKENS)
                load_a = agents(model="A", users=USERS, sessions=sessions)
                self._load(pool, "agents", self.plan.agents_order, (load_a, load_b), suffix="", ideal=ideal)
            if "chat" in self.plan.stages:
                ideal, loads = chats_ideal_hit_ratio(block_tokens=BLOCK_TOKENS), (chats(model="A"), load_b)
                self._load(pool, "chat", self.plan.chat_order, loads, suffix="-chat", ideal=ideal)
            if "lender" in self.plan.stages:
                self._lender(pool, load_b)

    def _load(
        self,
        pool: ArmPool,
        stage: str,
        order: Sequence[str],
        loads: tuple[Workload, Workload],
        *,
        suffix: str,
        ideal: float,
    ) -> None:
        """Runs in order, then the metrics of all arms and their ratios' intervals under NAME + suffix."""
        for number, name in enumerate(order, start=1):
            self._play(pool, name, f"{stage}, run {number} of {len(order)}: {name}", loads, name + suffix)
        ran = [name + suffix for name in dict.fromkeys(order)]
        for name in ran:
            self._arms[name] = turns_metrics(self._runs[name], ideal_hit_ratio=ideal)
        for over, under in compared(ran, suffix):
            self._intervals |= ratio_intervals(self._runs[over], self._runs[under], name=f"{over}/{under}")

    def _lender(self, pool: ArmPool, load_b: Workload) -> None:
        """Engine B alone is measured, under the agents' pressure on A: runs are as short as B's trace, so there can be more."""
        load_a = unmeasured(agents(model="A", users=USERS, sessions=48))
        order = self.plan.lender_order
        for number, name in enumerate(order, start=1):
            self._play(pool, name, f"lender, run {number} of {len(order)}: {name}", (load_a, load_b), f"{name}-lender")
        for name in dict.fromkeys(order):
            found = turns_metrics(self._runs[f"{name}-lender"], ideal_hit_ratio=1.0)
            self._arms[f"{name}-lender"] = {"B": found["B"]}
        if {"stock", "polder"} <= set(order):
            ours, theirs = self._runs["polder-lender"], self._runs["stock-lender"]
            self._intervals |= ratio_intervals(ours, theirs, name="polder-lender/stock-lender", engines=("B",))

    def _play(self, pool: ArmPool, name: str, title: str, loads: tuple[Workload, Workload], kept_as: str) -> None:
        arm = pool.get(name)
        time.sleep(QUIET_S)
        with self._timed(title), self._report.stage(title) as stage:
            run = asyncio.run(run_once(arm, *loads, stage))
        run.arm = kept_as
        self._report.note(f"others took {100 * run.foreign_cpu_s / run.wall_s:.0f} % of a core meanwhile")
        self._runs.setdefault(kept_as, []).append(run)

    def _noreuse(self, pool: ArmPool) -> None:
        stock, polder = pool.get("stock"), pool.get("polder")
        for at_a_time in NOREUSE_AT_A_TIME:
            blocks = unique_prompts(model="A", at_a_time=at_a_time, **NOREUSE)
            title = f"noreuse, {at_a_time} at a time, stock and polder in turn"
            with self._timed(title), self._report.stage(title) as stage:
                pairs = tax_pairs(
                    stock,
                    polder,
                    blocks,
                    rounds=self.plan.noreuse_rounds,
                    stage=stage,
                    engine="A",
                    uncounted_rounds=self.plan.noreuse_uncounted_rounds,
                )
                theirs, ours = asyncio.run(pairs)
            over, under = f"polder-noreuse-{at_a_time}", f"stock-noreuse-{at_a_time}"
            self._arms[under], self._arms[over] = {"A": tax_metrics(theirs)}, {"A": tax_metrics(ours)}
            for metric, interval in tax_intervals(theirs, ours).items():
                self._intervals[f"{over}/{under}:A.{metric}"] = interval

    def _restart(self, runtime: Path) -> None:
        engine, _ = self._engines()
        plan = RestartPlan(sessions=self.plan.sessions)
        for arm in self.plan.restart_order:
            with self._timed(f"restart, {arm}"):
                runs = run_restart(
                    arm, engine, plan, self.plan.links,
                    logs=self._logs, runtime=runtime, workdir=self._workdir, report=self._report,
                )  # fmt: skip
            for run in runs:
                self._runs.setdefault(run.arm, []).append(run)
        for suffix in RESTART_SUFFIXES:
            ran = [arm + suffix for arm in dict.fromkeys(self.plan.restart_order)]
            self._arms |= {name: restart_metrics(self._runs[name]) for name in ran}
            for over, under in compared(ran, suffix):
                ours, theirs = self._runs[over], self._runs[under]
                self._intervals |= ratio_intervals(ours, theirs, name=f"{over}/{under}", engines=("A",))

    def _equality(self, runtime: Path) -> None:
        exact = {"A": MODEL_A.in_float32(), "B": MODEL_B.in_float32()}
        setup = ArmSetup(
            engines=turns_engines(exact, EQUALITY_MAX_MODEL_LEN, EQUALITY_BYTES, self._workdir / "models"),
            sizes=EQUALITY_BYTES,
            links=self.plan.links,
            log_dir=self._logs,
            runtime_dir=runtime,
            suffix="-equality",
        )
        rounds = rounds_of_questions(self.plan.seed)
        answered: dict[str, Answered] = {}
        with self._timed("equality"), arm_pool(setup, at_most=1, prepare=lambda _: None, say=self._report.note) as pool:
            for name in dict.fromkeys(("stock", *self.plan.equality_arms)):
                arm = pool.get(name)
                with self._report.stage(f"Same prompts again and again (float32): {name}"):
                    answered[name] = asyncio.run(answer(arm, rounds))
        stock = answered.pop("stock")
        for name, found in answered.items():
            self._arms[f"{name}-equality"] = {"all": compare_answers(stock, found)}

    # ------------------------------------------------------------------ the result

    def _result(self) -> tuple[BenchResult, list[Check]]:
        ratios: dict[str, float] = {}
        suffixes = ["", "-chat", "-lender", *RESTART_SUFFIXES, *(f"-noreuse-{number}" for number in NOREUSE_AT_A_TIME)]
        for suffix in suffixes:
            for over, under in compared(self._arms, suffix):
                ratios |= ratios_over(self._arms, arm=over, baseline=under)
        checks = turns_checks(self._arms, ratios, self._intervals)
        result = BenchResult(
            bench="turns",
            conditions=self._conditions(),
            arms=self._arms,
            ratios=ratios,
            checks={check.name: check.passed for check in checks},
        )
        return result, checks

    def _conditions(self) -> dict[str, Any]:
        return {
            **describe_turns(self.plan, self._engines()),
            "restart": describe_restart(RestartPlan(sessions=self.plan.sessions), self.plan.links),
            **describe_turns_runs([run for runs in self._runs.values() for run in runs], self._intervals),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "started": self._started_at.isoformat(timespec="seconds"),
            "stage_seconds": self._stage_seconds,
            "total_seconds": round(time.monotonic() - self._started),
        }

    # ------------------------------------------------------------------ plumbing

    def _engines(self) -> list[EnginePlan]:
        recipes = {"A": MODEL_A, "B": MODEL_B}
        return turns_engines(recipes, MAX_MODEL_LEN, LOAD_BYTES, self._workdir / "models")

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._stage_seconds[stage] = round(time.monotonic() - started, 1)
