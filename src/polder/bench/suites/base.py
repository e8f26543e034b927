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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from rich.console import Console

from polder.bench.harness.arms import Arm, ArmPool, ArmSpec
from polder.bench.harness.driver import ClosedLoop, Workload
from polder.bench.harness.machine import check_engine, describe_machine, describe_versions
from polder.bench.harness.progress import Reporter, Stage
from polder.bench.harness.runs import Run, run_loads
from polder.bench.report.html import Plot, render
from polder.bench.report.limits import Check, Verdict, judge
from polder.bench.report.metrics import Interval, Metrics, good, percentile, ratio_intervals, ttfts_ms
from polder.bench.report.result import Arms, BenchResult, ratios_over, write_result
from polder.bench.report.tables import Table, print_tables
from polder.bench.stages.equality import Round, answer, compare
from polder.bench.stages.tax import measure_tax, tax_intervals, tax_metrics
from polder.bench.suites.plan import Plan
from polder.errors import InternalError

__all__ = ["Suite"]

P = TypeVar("P", bound=Plan)


class Suite(ABC, Generic[P]):
    """One run of a bench: a method for each stage of its plan, which adds to `arms`, `runs` and `intervals`. The
    result is made of them at the end."""

    name: ClassVar[str]
    full: ClassVar[Plan]
    quick: ClassVar[Plan]
    baselines: ClassVar[Mapping[str, tuple[str, ...]]]
    """Arm -> arms that it is compared with, also where both names have the same suffix."""
    also_compared: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(arm, baseline) of further ratios, names as in the result."""
    interval_engines: ClassVar[tuple[str, ...]] = ("A", "B")
    """Engines whose times get intervals. A suite with engines of other names says so here."""
    intervals_how: ClassVar[str] = "95 %, bootstrap: requests (TTFT) or gaps (TBT) resampled within each arm"
    starts_engines: ClassVar[bool] = True

    def __init__(self, plan: P, *, workdir: Path, console: Console | None = None) -> None:
        self.plan = plan
        self.workdir, self.logs, self.models = workdir, workdir / f"logs-{self.name}", workdir / "models"
        self.arms: Arms = {}
        self.runs: list[Run] = []
        self.intervals: dict[str, Interval] = {}
        self.reporter = Reporter(console or Console())
        self.note = self.reporter.note
        self._stage_seconds: dict[str, float] = {}
        self._started, self._started_at = time.monotonic(), datetime.now(UTC)
        self._pool_of: tuple[object, ...] = ()
        self._up = ExitStack()

    # ------------------------------------------------------------------ what a suite says

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for plan in (vars(cls).get("full"), vars(cls).get("quick")):
            for stage in plan.choices if plan is not None else ():
                if hasattr(Suite, stage) or not hasattr(cls, stage):
                    raise InternalError(
                        f"stage {stage!r} of {cls.__name__} needs a method of its own that Suite has not"
                    )

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

    def ratios(self) -> dict[str, float]:
        pairs = [*self._pairs(self.arms), *self.also_compared]
        found = [ratios_over(self.arms, arm=a, baseline=b) for a, b in pairs if {a, b} <= self.arms.keys()]
        return {key: ratio for of in found for key, ratio in of.items()}

    def _pairs(self, names: Collection[str]) -> list[tuple[str, str]]:
        """(arm, baseline) among `names`, which are those of `baselines` with the same suffix, as of a stage or a load."""
        return [
            (name, base + name.removeprefix(arm))
            for arm, of in self.baselines.items()
            for name in names
            for base in of
            if name.startswith(arm) and base + name.removeprefix(arm) in names
        ]

    # ------------------------------------------------------------------ the run

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        """Runs all stages, writes the files, prints the tables. Raises PolderError when a stage cannot run."""
        if self.starts_engines:
            check_engine()
        written = [path for path in (json_file, html_file) if path]
        for folder in (*(path.parent for path in written), self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.note(self.describe().get("links", f"plan {self.plan.name}: {', '.join(self.plan.stages)}"))
        try:
            with self._up:
                for stage in self.plan.stages:
                    getattr(self, stage)()
        finally:  # what was measured before an engine failed is not lost
            (self.workdir / f"{self.name}-runs.json").write_bytes(msgspec.json.encode(self.runs))
        result = self._result()
        write_result(result, json_file)
        if html_file is not None:
            html_file.write_text(self.page(result, self.runs))
        print_tables(self.reporter.console, self.tables(result))
        for verdict in self.verdicts(result):
            mark = "[green]ok    [/]" if verdict.passed else "[bold red]MISSED[/]"
            self.reporter.console.print(f"{mark} {verdict.name}: {verdict.detail}", highlight=False, soft_wrap=True)
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
        return render(
            conditions,
            **{"title": cls.name, "subtitle": cls.__doc__} | cls.prose("page"),
            line=f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores. {started} {links}",
            tiles=[(f"{value:.2f}", text) for text, value in tiles.items()],
            checks=cls.verdicts(result),
            plots=list(cls.plots(result, runs)),
            tables=list(cls.tables(result)),
        )

    def _result(self) -> BenchResult:
        conditions = {
            "plan": self.plan.describe(),
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
        ttfts = {engine: ttfts_ms(good(records)) for engine, records in run.records.items()}
        p99_ms = {engine: round(percentile(of, 99)) for engine, of in ttfts.items() if len(of)}
        return run.describe() | {"ttft_p99_ms": p99_ms}

    @classmethod
    def prose(cls, part: str = "", **values: object) -> dict[str, Any]:
        """The words of the suite, or of a part of it, in data/words.toml, with `values` put in; none: empty."""
        words = tomllib.loads((files("polder.bench") / "data" / "words.toml").read_text()).get(cls.name, {})
        if part and part not in words:
            raise InternalError(f"data/words.toml has no [{cls.name}.{part}]")
        of = words.get(part, {}) if part else {key: text for key, text in words.items() if isinstance(text, str)}
        return {key: text.format(**values) for key, text in of.items()}

    # ------------------------------------------------------------------ what stages use

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """A step that is shown and timed."""
        started = time.monotonic()
        with self.reporter.stage(title) as stage:
            yield stage
        self._stage_seconds[title] = round(time.monotonic() - started, 1)

    def pool(
        self,
        spec_of: Callable[[str], ArmSpec],
        *,
        suffix: str = "",
        at_most: int = 1,
        prepare: Callable[[Arm], None] = lambda _: None,
    ) -> ArmPool:
        """Arms by name, `at_most` up at a time, each prepared once. They stay up for the next stages that ask for the same
        pool; those of another pool end."""
        if self._pool_of[:2] != (spec_of, suffix):
            self.close_pool()
            runtime = self._up.enter_context(TemporaryDirectory(prefix="polder-bench-"))  # short: it holds sockets

            def make(name: str) -> Arm:
                self.note(f"starting {name}{suffix}")
                return spec_of(name).make(name + suffix, self.logs, Path(runtime))

            pool = self._up.enter_context(ArmPool(make, prepare, at_most).open())
            self._pool_of = (spec_of, suffix, pool)
        found: ArmPool = self._pool_of[2]  # type: ignore[assignment]
        return found

    def close_pool(self) -> None:
        """Ends all arms that are up."""
        self._up.close()
        self._pool_of = ()

    @contextmanager
    def serving(self, name: str, spec: ArmSpec, suffix: str) -> Iterator[Arm]:
        """One arm, up until the block ends."""
        try:
            yield self.pool(lambda _: spec, suffix=suffix).get(name)
        finally:
            self.close_pool()

    def play(self, arm: Arm, title: str, loads: Mapping[str, Workload], *, kept_as: str, load: str = "") -> Run:
        """One run of the arm from empty prefix caches, kept under a name and a load."""
        time.sleep(arm.quiet_s)
        arm.reset_prefix_caches()
        with self.stage(title) as stage:
            run = asyncio.run(run_loads(arm, loads, stage))
        run.arm, run.load = kept_as, load
        self.note(f"others took {100 * run.foreign_cpu_s / run.wall_s:.0f} % of a core meanwhile")
        self.runs.append(run)
        return run

    def play_in_turn(
        self,
        pool: ArmPool,
        order: Sequence[str],
        loads: Mapping[str, Workload],
        metrics: Callable[[Sequence[Run]], dict[str, Metrics]],
        *,
        title: str,
        suffix: str = "",
    ) -> None:
        """The same loads on the arms in this order, then figures of each arm over all of its runs."""
        for number, name in enumerate(order, start=1):
            self.play(pool.get(name), f"{title}{number} of {len(order)}: {name}", loads, kept_as=name + suffix)
        self.summarise({name + suffix: self.runs_of(name + suffix) for name in order}, metrics)

    def runs_of(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm]

    def summarise(
        self, runs: Mapping[str, Sequence[Run]], metrics: Callable[[Sequence[Run]], dict[str, Metrics]]
    ) -> None:
        """Figures of each arm (name -> its runs), and intervals of the ratios among them."""
        self.arms |= {name: metrics(of) for name, of in runs.items()}
        for over, under in self._pairs(runs):
            pair = f"{over}/{under}"
            self.intervals |= ratio_intervals(runs[over], runs[under], name=pair, engines=self.interval_engines)

    def compare_tax(
        self, pool: ArmPool, blocks: Sequence[ClosedLoop], suffix: str, *, engine: str, rounds: int, uncounted: int
    ) -> None:
        """Stock and Polder in turn where nothing can be won; `uncounted` rounds come first."""
        over, under = f"polder{suffix}", f"stock{suffix}"
        stock, polder = pool.get("stock"), pool.get("polder")
        with self.stage(f"{over} and {under} in turn") as stage:
            sizes = {"rounds": rounds, "uncounted": uncounted}
            theirs, ours = measure_tax(stock, polder, blocks, engine=engine, stage=stage, **sizes)
        self.arms |= {under: {engine: tax_metrics(theirs)}, over: {engine: tax_metrics(ours)}}
        found = tax_intervals(theirs, ours)
        self.intervals |= {f"{over}/{under}:{engine}.{metric}": interval for metric, interval in found.items()}

    def compare_answers(
        self,
        spec_of: Callable[[str], ArmSpec],
        arms: Iterable[str],
        rounds: Sequence[Round],
        counters: Mapping[str, str],
        *,
        settle_s: float,
    ) -> None:
        """Answers of all arms to the same prompts, compared with stock's."""
        pool, answered = self.pool(spec_of, suffix="-equality"), {}
        for name in dict.fromkeys(("stock", *arms)):
            arm = pool.get(name)
            with self.stage(f"equality, the same prompts to float32 models: {name}"):
                answered[name] = answer(arm, rounds, counters, settle_s=settle_s)
        stock = answered.pop("stock")
        self.arms |= {f"{name}-equality": {"all": compare(stock, found)} for name, found in answered.items()}
