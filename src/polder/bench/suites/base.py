"""What every bench does: plan -> arms -> stages -> result -> limits -> report.

A suite is a subclass of `Suite` in a file of its own (CONTRIBUTING.md, "A new bench"). It says what to run and what
must come out; this module starts arms, times stages, computes ratios and intervals, judges limits, and writes and shows
the result. Everything that is shown is made from the result alone, so results of earlier runs can be shown again.
"""

from __future__ import annotations

import asyncio
import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from rich.console import Console

from polder.bench.harness.arms import Arm, ArmSpec
from polder.bench.harness.driver import ClosedLoop, Workload
from polder.bench.harness.machine import check_engine, describe_machine, describe_versions
from polder.bench.harness.pool import ArmPool
from polder.bench.harness.progress import Reporter, Stage
from polder.bench.harness.runs import Run, run_loads
from polder.bench.report.limits import Check, Verdict, judge
from polder.bench.report.metrics import Interval, Metrics, RunRecords, percentile, ttfts_ms
from polder.bench.report.page import Plot, render_page
from polder.bench.report.result import Arms, BenchResult, ratios_over, write_result
from polder.bench.report.summary import ratio_intervals
from polder.bench.report.tables import Table, print_tables
from polder.bench.stages.equality import Round, answer, compare
from polder.bench.stages.tax import tax_intervals, tax_metrics, tax_pairs
from polder.bench.suites.plan import Plan

__all__ = ["Suite"]


P = TypeVar("P", bound=Plan)


class Suite(ABC, Generic[P]):
    """One run of a bench. Stages add to `arms`, `runs` and `intervals`; the result is made of them at the end."""

    name: ClassVar[str]
    full: ClassVar[Plan]
    quick: ClassVar[Plan]
    baselines: ClassVar[Mapping[str, tuple[str, ...]]]
    """Arm -> arms that it is compared with."""
    also_compared: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(arm, baseline) of further ratios, names as in the result."""
    interval_engines: ClassVar[tuple[str, ...]] = ("A", "B")
    intervals_how: ClassVar[str] = "95 %, bootstrap: requests (TTFT) or gaps (TBT) resampled within each arm"
    starts_engines: ClassVar[bool] = True

    def __init__(self, plan: P, *, workdir: Path, console: Console | None = None) -> None:
        self.plan = plan
        self.workdir, self.logs, self.runtime = workdir, workdir / f"logs-{self.name}", Path()
        self.arms: Arms = {}
        self.runs: list[Run] = []
        self.intervals: dict[str, Interval] = {}
        self._console = console or Console()
        self._reporter = Reporter(self._console)
        self._stage_seconds: dict[str, float] = {}
        self._started, self._started_at = time.monotonic(), datetime.now(UTC)

    # ------------------------------------------------------------------ what a suite says

    @abstractmethod
    def measure(self) -> None:
        """Runs the stages of the plan. Raises PolderError when an engine fails."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was compared, in words and numbers, for the conditions of the result."""

    @classmethod
    @abstractmethod
    def checks(cls, result: BenchResult) -> Iterable[Check]:
        """What the bench must show. Checks of stages that were not run are left out by themselves."""

    @classmethod
    @abstractmethod
    def tables(cls, result: BenchResult) -> Iterable[Table]: ...

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterable[Plot]:
        """`runs`: those of the result; empty when they were not kept."""
        return ()

    def suffixes(self) -> Iterable[str]:
        """Suffixes of arms' names under which `baselines` are compared."""
        return ("",)

    def pairs(self, suffix: str = "") -> list[tuple[str, str]]:
        """(arm, baseline) of the pairs that were both measured."""
        pairs = ((arm + suffix, base + suffix) for arm, of in self.baselines.items() for base in of)
        return [(over, under) for over, under in pairs if {over, under} <= self.arms.keys()]

    def ratios(self) -> dict[str, float]:
        found: dict[str, float] = {}
        also = [pair for pair in self.also_compared if set(pair) <= self.arms.keys()]
        for over, under in [*(pair for suffix in self.suffixes() for pair in self.pairs(suffix)), *also]:
            found |= ratios_over(self.arms, arm=over, baseline=under)
        return found

    # ------------------------------------------------------------------ the run

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        """Runs all stages, writes the files, prints the tables. Raises PolderError when a stage cannot run."""
        if self.starts_engines:
            check_engine()
        written = [path for path in (json_file, html_file) if path]
        for folder in (*(path.parent for path in written), self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with TemporaryDirectory(prefix="polder-bench-") as runtime:
                self.runtime = Path(runtime)  # short and private, for the brokers' sockets
                self.measure()
        finally:  # what was measured before an engine failed is not lost
            (self.workdir / f"{self.name}-runs.json").write_bytes(msgspec.json.encode(self.runs))
        result = self._result()
        write_result(result, json_file)
        if html_file is not None:
            html_file.write_text(self.page(result, self.runs))
        print_tables(self._console, self.tables(result))
        for verdict in self.verdicts(result):
            mark = "[green]ok    [/]" if verdict.passed else "[bold red]MISSED[/]"
            self._console.print(f"{mark} {verdict.name}: {verdict.detail}", highlight=False, soft_wrap=True)
        for path in written:
            self.note(f"written: {path}")
        return result

    @classmethod
    def verdicts(cls, result: BenchResult) -> list[Verdict]:
        return judge(cls.checks(result), result)

    @classmethod
    def page(cls, result: BenchResult, runs: Sequence[Run] = ()) -> str:
        """The result as one HTML file."""
        conditions = result.conditions
        machine = conditions.get("machine", {})
        tiles = {text: value for key, text in cls.prose("tiles").items() if (value := result.figure(key)) is not None}
        started, links = conditions.get("started", ""), conditions.get("links", "")
        return render_page(
            **cls.prose("page"),
            line=f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores. {started} {links}",
            conditions=conditions,
            tiles=[(f"{value:.2f}", text) for text, value in tiles.items()],
            checks=cls.verdicts(result),
            plots=cls.plots(result, runs),
            tables=cls.tables(result),
        )

    def _result(self) -> BenchResult:
        conditions = {
            **self.describe(),
            "intervals": {key: list(interval) for key, interval in sorted(self.intervals.items())},
            "intervals_how": self.intervals_how,
            "runs": [self._describe_run(run) for run in sorted(self.runs, key=lambda run: run.started_at)],
            "machine": describe_machine(),
            "versions": describe_versions(),
            "started": self._started_at.isoformat(timespec="seconds"),
            "stage_seconds": self._stage_seconds,
            "total_seconds": round(time.monotonic() - self._started),
        }
        ratios = self.ratios()
        result = BenchResult(bench=self.name, conditions=conditions, arms=self.arms, ratios=ratios, checks={})
        checks = {verdict.name: verdict.passed for verdict in self.verdicts(result)}
        return msgspec.structs.replace(result, checks=checks)

    @staticmethod
    def _describe_run(run: Run) -> dict[str, Any]:
        good = {engine: RunRecords(records=records).good for engine, records in run.records.items()}
        p99_ms = {engine: round(percentile(ttfts_ms(of), 99)) for engine, of in good.items() if len(ttfts_ms(of))}
        return run.describe() | {"ttft_p99_ms": p99_ms}

    @classmethod
    def prose(cls, part: str = "", **values: object) -> dict[str, Any]:
        """The words of the suite, or of a part of it, in data/words.toml, with `values` put in."""
        words = tomllib.loads((files("polder.bench") / "data" / "words.toml").read_text())[cls.name]
        of = words[part] if part else {key: text for key, text in words.items() if isinstance(text, str)}
        return {key: text.format(**values) for key, text in of.items()}

    # ------------------------------------------------------------------ what stages use

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """A step that is shown and timed."""
        started = time.monotonic()
        with self._reporter.stage(title) as stage:
            yield stage
        self._stage_seconds[title] = round(time.monotonic() - started, 1)

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def make_arm(self, name: str, spec: ArmSpec) -> Arm:
        """The arm, not started. Logs go to a folder of its name."""
        return spec.make(name, self.logs, self.runtime)

    @contextmanager
    def pool(
        self,
        spec_of: Callable[[str], ArmSpec],
        *,
        suffix: str = "",
        at_most: int = 1,
        prepare: Callable[[Arm], None] = lambda _: None,
    ) -> Iterator[ArmPool]:
        """Arms by name, `at_most` up at a time, each prepared once; whatever happens, nothing of them is left."""

        def make(name: str) -> Arm:
            self.note(f"starting {name}{suffix}")
            return self.make_arm(name + suffix, spec_of(name))

        pool = ArmPool(make, prepare, at_most=at_most)
        try:
            yield pool
        finally:
            pool.close()

    def play(self, arm: Arm, title: str, loads: Mapping[str, Workload], *, kept_as: str, load: str = "") -> Run:
        """One run of the arm, kept under a name and a load."""
        time.sleep(arm.quiet_s)
        with self.stage(title) as stage:
            run = asyncio.run(run_loads(arm, loads, stage))
        run.arm, run.load = kept_as, load
        self.note(f"others took {100 * run.foreign_cpu_s / run.wall_s:.0f} % of a core meanwhile")
        self.runs.append(run)
        return run

    def summarise(
        self,
        runs: Mapping[str, Sequence[Run]],
        metrics: Callable[[Sequence[Run]], dict[str, Metrics]],
        suffix: str = "",
    ) -> None:
        """Figures of each arm (name with suffix -> its runs), and intervals of the ratios among them."""
        self.arms |= {name: metrics(of) for name, of in runs.items() if of}
        for over, under in self.pairs(suffix):
            if over in runs and under in runs:
                pair, engines = f"{over}/{under}", self.interval_engines
                self.intervals |= ratio_intervals(runs[over], runs[under], name=pair, engines=engines)

    def tax(
        self, pool: ArmPool, blocks: Sequence[ClosedLoop], suffix: str, *, engine: str, rounds: int, extra: int
    ) -> None:
        """Stock and Polder in turn where nothing can be won; `extra` rounds come first and are not counted."""
        over, under = f"polder{suffix}", f"stock{suffix}"
        with self.stage(f"{over} and {under} in turn") as stage:
            playing = tax_pairs(
                *(pool.get("stock"), pool.get("polder"), blocks),
                engine=engine,
                rounds=rounds,
                uncounted_rounds=extra,
                stage=stage,
            )
            theirs, ours = asyncio.run(playing)
        self.arms |= {under: {engine: tax_metrics(theirs)}, over: {engine: tax_metrics(ours)}}
        found = tax_intervals(theirs, ours)
        self.intervals |= {f"{over}/{under}:{engine}.{metric}": interval for metric, interval in found.items()}

    def equality(
        self,
        pool: ArmPool,
        arms: Iterable[str],
        rounds: Sequence[Round],
        counters: Mapping[str, str],
        *,
        settle_s: float,
    ) -> None:
        """Answers of all arms to the same prompts, compared with stock's."""
        answered = {}
        for name in dict.fromkeys(("stock", *arms)):
            arm = pool.get(name)
            with self.stage(f"equality, the same prompts to float32 models: {name}"):
                answered[name] = asyncio.run(answer(arm, rounds, counters, settle_s=settle_s))
        stock = answered.pop("stock")
        self.arms |= {f"{name}-equality": {"all": compare(stock, found)} for name, found in answered.items()}
