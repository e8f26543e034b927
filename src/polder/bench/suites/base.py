"""What every bench does: plan -> arms -> stages -> result -> limits -> report.

A suite is a subclass of `Suite` in a file of its own (CONTRIBUTING.md, "A new bench"). It says what to run and what
must come out; this module starts arms, times stages, computes ratios and intervals, judges limits, and writes and shows
the result. Everything that is shown is made from the result alone, so results of earlier runs can be shown again.
"""

from __future__ import annotations

import asyncio
import sys
import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from rich.console import Console

from polder.bench.harness.arms import Arm, ArmGroup, ArmPool, Serving
from polder.bench.harness.driver import ClosedLoop, Workload
from polder.bench.harness.machine import describe_machine, describe_versions
from polder.bench.harness.progress import Reporter
from polder.bench.harness.runs import Run, run_loads
from polder.bench.report.html import Plot, render
from polder.bench.report.limits import Check, Verdict, judge
from polder.bench.report.metrics import Interval, Metrics, good, percentile, ratio_intervals, ttfts_ms
from polder.bench.report.result import Arms, BenchResult, ratios_over, write_result
from polder.bench.report.tables import Table, arm_tables, print_tables
from polder.bench.stages.equality import Round, answer, compare
from polder.bench.stages.tax import measure_tax, tax_intervals, tax_metrics
from polder.bench.suites.plan import Plan
from polder.errors import InternalError

__all__ = ["Suite"]

P = TypeVar("P", bound=Plan)
SHOWN_WORDS = ("page", "tiles", "tables")
"""Parts of a suite's words that its page needs; the others are conditions of its result."""


class Suite(ABC, Generic[P]):
    """One run of a bench: a method for each stage of its plan, which adds to `arms`, `runs` and `intervals`. The
    result is made of them at the end."""

    name: ClassVar[str]
    full: ClassVar[Plan]
    quick: ClassVar[Plan]
    baselines: ClassVar[Mapping[str, tuple[str, ...]]]
    """Arm -> arms that it is compared with, also where both names have the same suffix."""
    ratio_intervals = staticmethod(ratio_intervals)

    def __init__(self, plan: P, *, workdir: Path, console: Console | None = None) -> None:
        self.plan = plan
        self.workdir, self.logs, self.models = workdir, workdir / f"logs-{self.name}", workdir / "models"
        self.arms: Arms = {}
        self.runs: list[Run] = []
        self.intervals: dict[str, Interval] = {}
        self.conditions: dict[str, Any] = {}
        """What stages found out about what they compare."""
        self.reporter = Reporter(console or Console())
        self.note, self.stage = self.reporter.note, self.reporter.stage
        self.pool = ArmPool(self.logs, self.note)
        self._started, self._started_at = time.monotonic(), datetime.now(UTC)

    # ------------------------------------------------------------------ what a suite says

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for plan in (vars(cls).get("full"), vars(cls).get("quick")):
            for stage in plan.choices if plan is not None else ():
                if hasattr(Suite, stage) or not hasattr(cls, stage):
                    raise InternalError(
                        f"stage {stage!r} of {cls.__name__} needs a method of its own that Suite has not"
                    )

    @classmethod
    @abstractmethod
    def checks(cls, result: BenchResult) -> Iterable[Check]:
        """What the bench must show. Checks of stages that were not run are left out by themselves."""

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        """Those that its words name."""
        known = dict.fromkeys(arm for of in cls.full.choices.values() for arm in of.known) or ("stock", "polder")
        for key, title in cls.words()["tables"].items():
            yield from arm_tables(result, title, key, known)

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterable[Plot]:
        """`runs`: those of the result; empty when they were not kept."""
        return ()

    @classmethod
    def words(cls) -> dict[str, Any]:
        """All that data/words.toml has for the suite."""
        found: dict[str, Any] = tomllib.loads((files("polder.bench") / "data" / "words.toml").read_text())[cls.name]
        return found

    def ratios(self) -> dict[str, float]:
        found = [ratios_over(self.arms, arm=a, baseline=b) for a, b in self._pairs(self.arms)]
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
        written = [path for path in (json_file, html_file) if path]
        for folder in (*(path.parent for path in written), self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.note(f"plan {self.plan.name}: {', '.join(self.plan.stages)}")
        try:
            with self.pool:
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
        conditions, words = result.conditions, cls.words()
        machine = conditions.get("machine", {})
        tiles = {text: value for key, text in words["tiles"].items() if (value := result.figure(key)) is not None}
        started, links = conditions.get("started", ""), conditions.get("links", "")
        return render(
            conditions,
            **words["page"],
            line=f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores. {started} {links}",
            tiles=[(f"{value:.2f}", text) for text, value in tiles.items()],
            checks=cls.verdicts(result),
            plots=list(cls.plots(result, runs)),
            tables=list(cls.tables(result)),
        )

    def _result(self) -> BenchResult:
        # What the words name are constants of the suite's module and fields of its plan.
        names = {"plan": self.plan} | vars(sys.modules[type(self).__module__])
        conditions = {
            "plan": self.plan.describe(),
            **{part: _filled_in(of, names) for part, of in self.words().items() if part not in SHOWN_WORDS},
            "intervals_how": "95 %, bootstrap: requests (TTFT), gaps (TBT) or pairs of blocks (tax) resampled",
            **self.conditions,
            "engines": {arm: [engine.describe() for engine in of] for arm, of in self.pool.served.items()},
            "intervals": {key: list(interval) for key, interval in sorted(self.intervals.items())},
            "runs": [self._describe_run(run) for run in sorted(self.runs, key=lambda run: run.started_at)],
            "machine": describe_machine(),
            "versions": describe_versions(),
            "started": self._started_at.isoformat(timespec="seconds"),
            "stage_seconds": self.reporter.stage_seconds,
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

    # ------------------------------------------------------------------ what stages use

    def measure(self, arm: Arm, title: str, loads: Mapping[str, Workload], *, kept_as: str, load: str = "") -> None:
        """One run of the arm, kept under a name and a load."""
        with self.stage(title) as update:
            run = asyncio.run(run_loads(arm, loads, update))
        run.arm, run.load = kept_as, load
        self.note(f"others took {100 * run.foreign_cpu_s / run.wall_s:.0f} % of a core meanwhile")
        self.runs.append(run)

    def play(self, arm: Arm, title: str, loads: Mapping[str, Workload], *, kept_as: str, load: str = "") -> None:
        """As `measure`, from empty prefix caches."""
        time.sleep(arm.quiet_s)
        arm.reset_prefix_caches()
        self.measure(arm, title, loads, kept_as=kept_as, load=load)

    def play_in_turn(
        self,
        group: ArmGroup,
        order: Sequence[str],
        loads: Mapping[str, Workload],
        metrics: Callable[[Sequence[Run]], dict[str, Metrics]],
        *,
        title: str,
        suffix: str = "",
    ) -> None:
        """The same loads on the arms in this order, then figures of each arm over all of its runs."""
        for number, name in enumerate(order, start=1):
            arm = self.pool.get(group, name)
            self.play(arm, f"{title}{number} of {len(order)}: {name}", loads, kept_as=name + suffix)
        self.summarise({name + suffix: self.runs_of(name + suffix) for name in order}, metrics)

    def runs_of(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm]

    def summarise(
        self, runs: Mapping[str, Sequence[Run]], metrics: Callable[[Sequence[Run]], dict[str, Metrics]]
    ) -> None:
        """Figures of each arm (name -> its runs), and intervals of the ratios among them."""
        self.arms |= {name: metrics(of) for name, of in runs.items()}
        for over, under in self._pairs(runs):
            self.intervals |= self.ratio_intervals(runs[over], runs[under], name=f"{over}/{under}")

    def compare_tax(
        self, group: ArmGroup, blocks: Sequence[ClosedLoop], suffix: str, *, engine: str, rounds: int, uncounted: int
    ) -> None:
        """Stock and Polder in turn where nothing can be won; `uncounted` rounds come first."""
        under, over = names = f"stock{suffix}", f"polder{suffix}"
        arms = [self.pool.get(group, name) for name in ("stock", "polder")]
        with self.stage(f"{over} and {under} in turn") as update:
            sizes = {"rounds": rounds, "uncounted": uncounted}
            found = measure_tax(arms, blocks, engine=engine, update=update, **sizes)
        self.arms |= {name: {engine: tax_metrics(of)} for name, of in zip(names, found, strict=True)}
        self.intervals |= {f"{over}/{under}:{engine}.{m}": ends for m, ends in tax_intervals(*found).items()}

    def compare_answers(
        self,
        spec: Callable[[str], Serving],
        arms: Iterable[str],
        rounds: Sequence[Round],
        counters: Mapping[str, str],
        *,
        settle_s: float,
    ) -> None:
        """Answers of all arms to the same prompts, compared with stock's."""
        answered = {}
        for name in dict.fromkeys(("stock", *arms)):
            arm = self.pool.get(ArmGroup(spec, "-equality"), name)
            with self.stage(f"equality, the same prompts to float32 models: {name}"):
                answered[name] = answer(arm, rounds, counters, settle_s=settle_s)
        stock = answered.pop("stock")
        self.arms |= {f"{name}-equality": {"all": compare(stock, found)} for name, found in answered.items()}


def _filled_in(words: Any, names: Mapping[str, Any]) -> Any:
    """Texts, and tables of texts, with {names} replaced."""
    if isinstance(words, str):
        return words.format(**names)
    return {key: _filled_in(of, names) for key, of in words.items()}
