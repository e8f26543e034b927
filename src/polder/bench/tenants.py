"""`polder bench tenants`: three models on one device, whose weights and KV share a budget.

They take turns, as the traces' models do, and two of them are in use at once. Compared are plain vLLM, where each model has its
weights and a third of the KV memory for good; Polder with elastic KV alone; and Polder with weights that make room too. The same
bytes in all arms.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from rich.console import Console

from polder.bench import tenants_equality
from polder.bench.checks import Check
from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import Workload
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan
from polder.bench.harness.machine import check_engine, describe_machine, describe_versions
from polder.bench.harness.pool import ArmPool
from polder.bench.harness.progress import Reporter, reporter_for
from polder.bench.harness.runs import run_loads
from polder.bench.harness.weights import moved, weight_counts
from polder.bench.report.result import Arms, BenchResult, ratios_over, without_nan, write_result
from polder.bench.stages import comeback as tenants_comeback
from polder.bench.stages import streaming as tenants_streaming
from polder.bench.tenants_checks import exhausted_loads, tenants_checks
from polder.bench.tenants_conditions import describe_tenants, describe_tenants_runs
from polder.bench.tenants_metrics import TenantsRun, ratio_intervals, tenants_metrics
from polder.bench.tenants_plan import ARMS, ARMS_UP, COMEBACK_ENGINE, COMEBACK_PROMPT, EQUALITY_ENGINES, TenantsPlan
from polder.bench.tenants_setup import arm_pool, tenants_engines, warm
from polder.bench.workloads.tenants import MAX_MODEL_LEN, spatial, temporal
from polder.bench.workloads.tenants_models import TENANTS

__all__ = ["TenantsBench"]

QUIET_S = 2.0
"""vLLM's processes spin for a second after their last message: an arm that was just used must not take another's core."""
BASELINES = {"stock-short": ("stock",), "kv-only": ("stock",), "polder": ("stock", "stock-short", "kv-only")}
COMEBACKS = (
    ("polder-resident", "stock-resident"),
    ("polder-streamed", "stock-resident"),
    ("polder-streamed", "stock-anew"),
    ("polder-whole", "polder-streamed"),
    ("polder-whole-link", "polder-streamed-link"),
)


class TenantsBench:
    """One run of the bench. Stages add to `arms`; the result is made of them at the end."""

    def __init__(self, plan: TenantsPlan, *, workdir: Path, console: Console | None = None) -> None:
        self.plan = plan
        self._console = console or Console()
        self._report: Reporter = reporter_for(self._console)
        self._workdir = workdir
        self._logs = workdir / "logs-tenants"
        self._arms: Arms = {}
        self._intervals: dict[str, tuple[float, float]] = {}
        self._runs: list[TenantsRun] = []
        self._stage_seconds: dict[str, float] = {}
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC)

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        """Runs all stages, writes the files, prints the tables. Raises PolderError when an engine fails."""
        from polder.bench.tenants_report import print_tenants, write_tenants_html

        check_engine()
        for path in filter(None, (json_file, html_file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        self._report.note(f"about {self.plan.expected_s / 60:.0f} minutes on two cores")
        try:
            with TemporaryDirectory(prefix="polder-bench-") as runtime:
                if {"temporal", "spatial"} & set(self.plan.stages):
                    self._under_load(Path(runtime))
                if "comeback" in self.plan.stages:
                    self._comeback(Path(runtime))
                if "streaming" in self.plan.stages:
                    self._streaming(Path(runtime))
                if "equality" in self.plan.stages:
                    self._equality(Path(runtime))
        finally:  # what was measured before an engine failed is not lost
            (self._workdir / "tenants-runs.json").write_bytes(msgspec.json.encode(self._runs))
        result, checks = self._result()
        write_result(result, json_file)
        if html_file is not None:
            write_tenants_html(html_file, result, checks)
        print_tenants(self._console, result, checks)
        for path in filter(None, (json_file, html_file)):
            self._report.note(f"written: {path}")
        return result

    # ------------------------------------------------------------------ stages

    def _under_load(self, runtime: Path) -> None:
        engines = self._engines()
        with self._pool(engines, runtime, at_most=ARMS_UP, warmed=True) as pool:
            for number, leg in enumerate(self.plan.legs, start=1):
                for load, loads in self._loads(leg.rates):
                    title = f"leg {number} of {len(self.plan.legs)}: {leg.arm}, {load}"
                    self._play(pool.get(leg.arm), leg.arm, load, title, loads)
        self._measure({engine.name: engine.blocks * BLOCK_TOKENS for engine in engines})

    def _measure(self, pool_tokens: Mapping[str, int]) -> None:
        """Metrics and intervals of each load by itself, and without a suffix of those at which stock's KV is exhausted."""
        for load in dict.fromkeys(run.load for run in self._runs):
            self._summarise(f"-{load}", [load], pool_tokens)
        self._summarise("", exhausted_loads(self._arms, self._rates()), pool_tokens)

    def _summarise(self, suffix: str, loads: Sequence[str], pool_tokens: Mapping[str, int]) -> None:
        """Of the runs under `loads`, each arm's together."""
        runs = {arm + suffix: [r for r in self._runs if r.run.arm == arm and r.load in loads] for arm in ARMS}
        self._arms |= {name: tenants_metrics(of, pool_tokens=pool_tokens) for name, of in runs.items() if of}
        for over, under in self._compared(suffix):
            self._intervals |= ratio_intervals(runs[over], runs[under], name=f"{over}/{under}")

    def _loads(self, rates: tuple[float, ...]) -> Iterator[tuple[str, Mapping[str, Workload]]]:
        """Of one leg: name of the load -> engines' workloads."""
        for rate in rates:
            yield f"x{rate:g}", temporal(slots=self.plan.slots, rate=rate, seed=self.plan.seed)
        if "spatial" in self.plan.stages:
            yield "spatial", spatial(users=self.plan.spatial_users, seed=self.plan.seed)

    def _play(self, arm: Arm, name: str, load: str, title: str, loads: Mapping[str, Workload]) -> None:
        time.sleep(QUIET_S)
        before = weight_counts(arm.broker)
        with self._timed(title), self._report.stage(title) as stage:
            run = asyncio.run(run_loads(arm, loads, stage))
        run.arm = name
        self._report.note(f"others took {100 * run.foreign_cpu_s / run.wall_s:.0f} % of a core meanwhile")
        self._runs.append(TenantsRun(load=load, run=run, weights=moved(before, weight_counts(arm.broker))))

    def _comeback(self, runtime: Path) -> None:
        engines = [engine for engine in self._engines() if engine.name == COMEBACK_ENGINE]
        prompts, samples = self.plan.comeback_prompts, self.plan.comeback_samples
        for name in tenants_comeback.ARMS:
            title = f"the first token after sleep: {name}"
            with (
                self._timed(title),
                self._report.stage(title) as stage,
                self._pool(engines, runtime, suffix="-comeback") as pool,
            ):
                started = time.perf_counter()
                arm = pool.get(name)
                if name == "stock":
                    anew = tenants_comeback.first_token_anew(arm, prompt_tokens=COMEBACK_PROMPT, started=started)
                    self._arms["stock-anew"] = {COMEBACK_ENGINE: anew}
                resident, reclaimed = tenants_comeback.resident_and_reclaimed(
                    arm, prompts=prompts, samples=samples, stage=stage
                )
            if reclaimed is not None:
                self._arms[name] = {COMEBACK_ENGINE: without_nan(reclaimed)}
            if name in tenants_comeback.RESIDENT:
                self._arms[tenants_comeback.RESIDENT[name]] = {COMEBACK_ENGINE: without_nan(resident)}

    def _streaming(self, runtime: Path) -> None:
        engines = [engine for engine in self._engines() if engine.name == COMEBACK_ENGINE]
        title = "steps while layers are streamed"
        with (
            self._timed(title),
            self._report.stage(title) as stage,
            self._pool(engines, runtime, suffix="-streaming") as pool,
        ):
            measuring = tenants_streaming.measure_streaming(pool.get("polder-link"), COMEBACK_ENGINE, stage=stage)
            self._arms["polder-streaming"] = {COMEBACK_ENGINE: asyncio.run(measuring)}

    def _equality(self, runtime: Path) -> None:
        exact = {name: TENANTS[name].in_float32() for name in EQUALITY_ENGINES}
        max_model_len = tenants_equality.EQUALITY_MAX_MODEL_LEN
        engines = tenants_engines(exact, max_model_len=max_model_len, models_dir=self._workdir / "models")
        asked = tenants_equality.questions_of(EQUALITY_ENGINES, self.plan.seed)
        answered: dict[str, tenants_equality.Answered] = {}
        with self._timed("equality"), self._pool(engines, runtime, suffix="-equality") as pool:
            for name in ("stock", "polder"):
                with self._report.stage(f"Same prompts while weights come and go (float32): {name}"):
                    answered[name] = asyncio.run(tenants_equality.answer(pool.get(name), asked))
        compared = tenants_equality.compare_answers(answered["stock"], answered["polder"])
        self._arms["polder-equality"] = {"all": compared}

    # ------------------------------------------------------------------ the result

    def _result(self) -> tuple[BenchResult, list[Check]]:
        pairs = [pair for s in ("", "-spatial", *(f"-{r}" for r in self._rates())) for pair in self._compared(s)]
        pairs += [(over, under) for over, under in COMEBACKS if {over, under} <= self._arms.keys()]
        ratios: dict[str, float] = {}
        for over, under in pairs:
            ratios |= ratios_over(self._arms, arm=over, baseline=under)
        checks = tenants_checks(self._arms, ratios, self._intervals, self._rates())
        result = BenchResult(
            bench="tenants",
            conditions=self._conditions(),
            arms=self._arms,
            ratios=ratios,
            checks={check.name: check.passed for check in checks},
        )
        return result, checks

    def _conditions(self) -> dict[str, Any]:
        return {
            **describe_tenants(self.plan, self._engines()),
            **describe_tenants_runs(self._runs, self._intervals),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "started": self._started_at.isoformat(timespec="seconds"),
            "stage_seconds": self._stage_seconds,
            "total_seconds": round(time.monotonic() - self._started),
        }

    # ------------------------------------------------------------------ plumbing

    def _engines(self) -> list[EnginePlan]:
        return tenants_engines(TENANTS, max_model_len=MAX_MODEL_LEN, models_dir=self._workdir / "models")

    def _pool(
        self, engines: list[EnginePlan], runtime: Path, *, suffix: str = "", at_most: int = 1, warmed: bool = False
    ) -> contextlib.AbstractContextManager[ArmPool]:
        return arm_pool(
            engines,
            log_dir=self._logs,
            runtime_dir=runtime,
            prepare=warm if warmed else lambda _: None,
            say=self._report.note,
            at_most=at_most,
            suffix=suffix,
        )

    def _rates(self) -> list[str]:
        return [f"x{rate:g}" for rate in self.plan.rates]

    def _compared(self, suffix: str) -> list[tuple[str, str]]:
        """(arm, baseline) of the pairs that were both run, with the suffix of a load."""
        pairs = [(arm + suffix, baseline + suffix) for arm, of_arm in BASELINES.items() for baseline in of_arm]
        return [(over, under) for over, under in pairs if {over, under} <= self._arms.keys()]

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._stage_seconds[stage] = round(time.monotonic() - started, 1)
