"""`polder bench replay`: a user's own fleet file under the user's own traces.

Compared are the fleet as its file says, and its models as plain vLLM engines that have fixed parts of the same KV bytes.
Each leg plays the same requests from empty caches; legs of both arms alternate. An arm is alone on the device while it
is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import typer
from rich.console import Console

from polder.bench.harness.arms import Arm, ArmGroup
from polder.bench.harness.driver import ClosedLoop, Turn, greedy, turns_of
from polder.bench.harness.fleets import FleetSpec, fixed_parts, load_own, on_own_disks
from polder.bench.harness.runs import Run, play_on
from polder.bench.report import legs, limits, plots
from polder.bench.report.html import Plot
from polder.bench.report.limits import Check, Limit, check
from polder.bench.report.metrics import arm_metrics
from polder.bench.report.result import BenchResult
from polder.bench.report.tables import Table, arm_tables
from polder.bench.stages.equality import OUTPUT_TOKENS, Round
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads.agents import ideal_of
from polder.bench.workloads.replays import LEFT_OUT, Pace, Served, make_replay, read_parts
from polder.bench.workloads.trace_files import FORMATS
from polder.bench.workloads.words import load_words
from polder.errors import ConfigError
from polder.units import format_bytes

__all__ = ["ReplayPlan", "ReplaySuite"]

ARMS = ("stock", "polder")
AGAIN = "stock-again"
"""Plain vLLM once more: what differs from itself says nothing of Polder."""
COMPARED = 8
"""Prompts of each model whose answers are compared, one request at a time."""
IDEAL_BLOCK_TOKENS = 16
ABOVE_0 = ("speed", "minutes", "rate", "output_tokens", "times", "requests")
FROM_0 = ("think", "block_tokens", "seed")


def _option(flag: str, kind: Any, text: str) -> Any:
    return Annotated[kind | None, typer.Option(flag, help=text)]


@dataclass(frozen=True, kw_only=True)
class ReplayPlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {
        "replay": StageArms(known=ARMS),
        "equality": StageArms(known=ARMS, needs_all=ARMS),
    }
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"format": tuple(FORMATS), "unit": ("ms", "s")}
    given: ClassVar[Mapping[str, Any]] = {
        "fleet": Annotated[str, typer.Argument(help="The fleet file, as `polder serve` takes it.")],
        "trace": Annotated[
            list[str] | None,
            typer.Option(
                help="MODEL=FILE: all requests of the file go to this model. FILE: each goes to the `model` of its line, "
                "or to the fleet's only one. May be repeated."
            ),
        ],
        "speed": _option("--speed", float, "Times and pauses of the traces are divided by it (default: 1)."),
        "minutes": _option("--minutes", float, "What begins later in a leg is left out (default: 10)."),
        "requests": _option("--requests", int, "The most requests of a leg (default: no limit)."),
        "rate": _option("--rate", float, "Without times: requests or conversations begun in a second (default: 1)."),
        "think": _option("--think", float, "Seconds from a reply to its conversation's next request (default: 1)."),
        "output_tokens": _option(
            "--output-tokens", int, "Of a reply of which the trace says no length (default: 256)."
        ),
        "block_tokens": _option("--block-tokens", int, "Of a hash id (default: as the lengths tell)."),
        "times": _option("--legs", int, "Legs of each arm (default: 2)."),
        "seed": _option("--seed", int, "For requests that come at random (default: 0)."),
    }
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"replay": ARMS})
    """One leg of each; the next ones come the other way round."""
    stages: tuple[str, ...] = ("replay", "equality")
    fleet: str = ""
    trace: Sequence[str] = ()
    format: str = ""
    """Empty: as the first line of a file looks."""
    unit: str = "ms"
    """Of times in traces."""
    speed: float = 1.0
    minutes: float = 10.0
    requests: int | None = None
    rate: float = 1.0
    think: float = 1.0
    output_tokens: int = 256
    block_tokens: int = 0
    times: int = 2

    @property
    def legs(self) -> list[str]:
        arms = self.orders["replay"]
        return [arm for number in range(self.times) for arm in arms[:: -1 if number % 2 else 1]]

    @property
    def pace(self) -> Pace:
        """Raises ConfigError for numbers that cannot be meant."""
        for name in (*ABOVE_0, *FROM_0):
            value = getattr(self, name)
            if value is not None and (value < 0 or (name in ABOVE_0 and value == 0)):
                flag = "legs" if name == "times" else name.replace("_", "-")
                raise ConfigError(
                    f"--{flag} {value}: write a number {'above 0' if name in ABOVE_0 else 'of 0 or more'}"
                )
        same = ("speed", "rate", "minutes", "requests", "output_tokens", "block_tokens", "seed")
        unit_s = 1e-3 if self.unit == "ms" else 1.0
        return Pace(think_s=self.think, unit_s=unit_s, **{name: getattr(self, name) for name in same})


class ReplaySuite(Suite[ReplayPlan]):
    """Your own fleet file under your own traces: plain vLLM with the same bytes, against Polder."""

    name = "replay"
    full = ReplayPlan(name="full")
    quick = ReplayPlan(name="quick", help="The first minute of the traces, one leg of each arm.", minutes=1.0, times=1)
    baselines: ClassVar = {"polder": ("stock",)}
    ratio_intervals = staticmethod(legs.leg_intervals)

    def __init__(self, plan: ReplayPlan, *, workdir: Path, console: Console | None = None) -> None:
        """Reads fleet and traces. Raises ConfigError or BudgetError before anything is started."""
        super().__init__(plan, workdir=workdir, console=console)
        self.own, pace = load_own(Path(plan.fleet)), plan.pace
        names = [engine.name for engine in self.own.engines]
        parts = read_parts(plan.trace, names, plan.format)
        served = {
            engine.name: Served(
                words=load_words(engine.name, engine.model.path, engine.model.args), longest=engine.max_model_len
            )
            for engine in self.own.engines
        }
        self.asked = make_replay(parts, served, pace)
        self._fixed = fixed_parts(self.own.fleet) if "stock" in plan.orders["replay"] else {}
        fleet, loads = self.own.fleet, self.asked.loads
        ideal = {model: ideal_of(load, IDEAL_BLOCK_TOKENS) for model, load in loads.items()}
        self.conditions = {
            "requests": {model: dict(of) for model, of in self.asked.counts.items()},
            "ideal_hit_ratio": ideal,
            "bytes": {
                "polder": f"{fleet.budget_bytes} on the device for all, {fleet.host_bytes} of host memory for tiers and windows",
                "stock": {model: f"{size} of KV, fixed" for model, size in self._fixed.items()},
            },
            "intervals_how": legs.HOW,
        }

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        for model, of in self.asked.counts.items():
            left = ", ".join(f"{of[key]} {text}" for key, text in LEFT_OUT.items() if of[key]) or "none"
            self.note(f"{model}: {of['played']} of {of['in_traces']} requests are played; left out: {left}")
        for model, size in self._fixed.items():
            self.note(f"{model}: {format_bytes(size)} of KV in the arm stock")
        with on_own_disks(self.own) as self.own:
            return super().run(json_file, html_file)

    # ------------------------------------------------------------------ stages

    def replay(self) -> None:
        order = self.plan.legs
        self.play_in_turn(ArmGroup(self.arm, prepare=self._warm_up), order, self.asked.loads, arm_metrics, title="leg ")
        if stock := self.runs_of("stock"):
            others = {AGAIN: stock[1:], "polder": self.runs_of("polder")}
            found = {arm: legs.compare_legs(of, stock[0]) for arm, of in others.items() if of}
            self.arms |= {f"{arm}-legs": {"all": metrics} for arm, metrics in found.items()}

    def equality(self) -> None:
        rounds = [
            Round({model: {turn.key: _prompt(turn)}}, {})
            for model in self.asked.loads
            for turn in self._compared(model)
        ]
        self.compare_answers(self.arm, [AGAIN, "polder"], rounds, {}, settle_s=0.0)

    def _compared(self, model: str) -> list[Turn]:
        """Some of its requests, evenly spaced, that leave room for the answers that are compared."""
        most = next(engine.max_model_len for engine in self.own.engines if engine.name == model) - OUTPUT_TOKENS
        short = [turn for turn in turns_of(self.asked.loads[model]) if len(_prompt(turn)) <= most]
        return short[:: -(-len(short) // COMPARED) or 1]

    def _warm_up(self, arm: Arm) -> None:
        """The longest prompt of each model, one after the other: it runs all code once."""
        for model, load in self.asked.loads.items():
            longest = max((_prompt(turn) for turn in turns_of(load)), key=len)
            turn = greedy(model, "warm", longest, 1)
            asyncio.run(play_on(arm, {model: ClosedLoop(users=[[turn]])}))

    # ------------------------------------------------------------------ arms

    def arm(self, name: str) -> FleetSpec:
        return FleetSpec("polder" if name == "polder" else "stock", self.own)

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        differ = [f"{arm}-equality:all.answers_different" for arm in ("polder", AGAIN)]
        more = limits.combined(
            "answers that differ, less those in which stock differs from itself", lambda of: of[0] - of[1], *differ
        )
        return [
            check(
                "answers_differ_no_more_than_stocks_own",
                Limit(more, "<=", 0),
                "polder-equality:all.answers_compared > 0",
            ),
            limits.failed_requests(),
        ]

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        counts = result.conditions["requests"]
        rows = {
            "in the traces": "in_traces",
            "played": "played",
            **{f"left out: {text}": key for key, text in LEFT_OUT.items()},
        }
        shown = [(text, [f"{of[key]:,}" for of in counts.values()]) for text, key in rows.items()]
        yield Table("Requests of a leg", list(counts), [[text, *numbers] for text, numbers in shown])
        for engine in _engines(result):
            yield from arm_tables(result, engine, f":{engine}", ARMS)
        yield from super().tables(result)

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterator[Plot]:
        if runs:
            yield plots.ttft_distribution(runs, _engines(result))
            yield from (plots.memory_by_engine(run) for run in [run for run in runs if run.timeline.samples][:1])


def _engines(result: BenchResult) -> list[str]:
    """Models that had requests."""
    return [model for model, of in result.conditions["requests"].items() if of["played"]]


def _prompt(turn: Turn) -> list[int]:
    prompt: list[int] = msgspec.json.decode(turn.body)["prompt"]
    return prompt
