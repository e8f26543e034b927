"""From the words on the command line to stages and arms: what would run nothing is refused before anything is started."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from polder.bench.suites.context import ARMS as WINDOWS
from polder.bench.suites.context import ContextPlan, ContextSuite
from polder.bench.suites.disks import DisksSuite
from polder.bench.suites.plan import Plan, parse_names
from polder.bench.suites.replay import ReplayPlan, ReplaySuite
from polder.bench.suites.tenants import TenantsSuite
from polder.bench.suites.turns import ARMS, TurnsSuite
from polder.cli import bench
from polder.errors import ConfigError


@pytest.mark.parametrize(
    ("plan", "stages", "arms", "words"),
    [
        (TurnsSuite.full, ["restart"], ["polder"], "restart .* polder: name some of stock, native-fs, polder-disk"),
        (TurnsSuite.full, ["noreuse"], ["polder"], "noreuse .* polder: name all of stock, polder"),
        (TurnsSuite.quick, ["agents", "lender"], ["stock", "native"], "stage lender .* name all of stock, polder"),
        (TurnsSuite.quick, ["chat"], ["native-fs"], "stage chat .* name some of stock, native"),
        (TurnsSuite.full, ["equality"], ["stock"], "stage equality .* name some of native, polder-host"),
        (DisksSuite.full, ["wall"], ["swarm"], "stage wall .* name some of hash, fixed-blocks"),
        (DisksSuite.quick, ["model", "wall"], ["raid0"], "stage wall .* name some of hash"),
    ],
)
def test_a_named_stage_without_an_arm_is_refused(plan: Plan, stages: list[str], arms: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan.only(stages=stages, arms=arms)


@pytest.mark.parametrize(
    ("plan", "stages", "arms", "kept"),
    [
        (TurnsSuite.full, (), ["polder-disk"], ("restart",)),
        (TurnsSuite.quick, (), ["native"], ("agents", "equality")),
        (TurnsSuite.full, (), ["stock", "polder"], tuple(TurnsSuite.full.choices)),
        (DisksSuite.full, (), ["swarm"], ("model", "shares")),
        (DisksSuite.full, (), ["swarm", "hash"], ("model", "shares", "wall")),
        (DisksSuite.full, ["live"], ["swarm"], ("live",)),
        (TenantsSuite.full, ["comeback", "spatial"], ["polder"], ("spatial", "comeback")),
    ],
)
def test_stages_run_in_their_order_and_only_with_their_arms(
    plan: Plan, stages: list[str], arms: list[str], kept: tuple[str, ...]
) -> None:
    assert plan.only(stages=stages, arms=arms).stages == kept
    assert plan.only() == plan


def test_arms_keep_their_order_and_one_that_the_plan_lacks_runs_once_at_the_end() -> None:
    orders = TurnsSuite.full.only(stages=["equality", "agents"], arms=["native", "stock"]).orders
    assert orders["agents"] == ("stock", "native", "native", "stock")
    assert orders["equality"] == ("stock", "native")
    assert TurnsSuite.quick.only(arms=["polder-peer"]).orders["agents"] == ("polder-peer",)
    assert TurnsSuite.quick.only(arms=["polder-peer"]).orders["equality"] == ("stock", "polder-peer")
    assert TenantsSuite.quick.only(arms=["kv-only", "stock"]).orders["temporal"] == ("stock", "stock", "kv-only")
    assert ContextSuite.quick.only(arms=["window-1"]).arms == ("enough", "window-1")
    assert (
        TurnsSuite.full.describe()["orders"]["agents"] == TurnsSuite.full.orders["agents"] == (*ARMS, *reversed(ARMS))
    )


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    assert parse_names(" agents, chat ,", TurnsSuite.full.choices, what="stage") == ["agents", "chat"]
    with pytest.raises(ConfigError, match=r"unknown arm 'polder-disk'; known are stock, native"):
        parse_names("polder-disk", ARMS, what="arm")


def test_every_suite_is_a_command_whose_help_names_all_of_its_stages_and_arms() -> None:
    group: Any = typer.main.get_command(bench.app)
    assert {"elastic", "turns", "tenants", "context", "disks"} <= set(group.list_commands(None))
    for name in group.list_commands(None):
        options = {parameter.opts[0]: parameter.help or "" for parameter in group.get_command(None, name).params}
        assert {"--json", "--html", "--quick", "--workdir"} <= options.keys()
        plan = getattr(import_module(f"polder.bench.suites.{name}"), f"{name.title()}Suite").full
        assert all(stage in options["--stages"] for stage in plan.choices)
        assert all(arm in options["--arms"] for of in plan.choices.values() for arm in of.known)
        assert {f"--{option}" for option in plan.options} <= options.keys()


def test_what_the_user_writes_gets_into_the_plan_and_the_rest_keeps_its_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans: list[ReplayPlan] = []
    monkeypatch.setattr(ReplaySuite, "__init__", lambda suite, plan, workdir: plans.append(plan))
    monkeypatch.setattr(ReplaySuite, "run", lambda *_: None)
    group: Any = typer.main.get_command(bench.app)
    to = ["--json", str(tmp_path / "result.json")]
    for words in (["--trace", "a=1", "--trace", "2", "--quick", "--speed", "3", "--legs", "4", "--unit", "s"], []):
        group.main(["replay", "fleet.toml", *words, *to], standalone_mode=False)
    quick, full = plans
    assert (quick.fleet, list(quick.trace), quick.speed, quick.unit, quick.minutes) == (
        "fleet.toml",
        ["a=1", "2"],
        3,
        "s",
        1,
    )
    assert quick.legs == ["stock", "polder", "polder", "stock"] * 2
    assert full == replace(ReplaySuite.full, fleet="fleet.toml")
    assert full.only(arms=["polder"]).legs == ["polder", "polder"]


@pytest.mark.parametrize(("name", "flag"), [("speed", "speed"), ("times", "legs"), ("output_tokens", "output-tokens")])
def test_numbers_of_a_replay_that_cannot_be_meant_are_refused(name: str, flag: str) -> None:
    none: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"--{flag} 0: write a number above 0"):
        _ = replace(ReplaySuite.full, **none).pace
    with pytest.raises(ConfigError, match="--think -1: write a number of 0 or more"):
        _ = replace(ReplaySuite.full, think=-1).pace


def test_rates_rise_on_one_leg_and_fall_on_the_next() -> None:
    rates = [rates for _, rates in TenantsSuite.quick.legs]
    assert rates == [(0.5, 4.0), (4.0, 0.5), (0.5, 4.0), (4.0, 0.5)]
    assert not any(rates for _, rates in TenantsSuite.full.only(stages=["spatial"]).legs)


PLANS = [ContextSuite.quick, replace(ContextSuite.full, name="full")]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("arm", [arm for arm in WINDOWS if arm != "enough"])
def test_contexts_grow_to_the_arms_longest_and_pass_stocks(plan: ContextPlan, arm: str) -> None:
    lengths = plan.lengths(arm)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == plan.longest(arm)
    assert plan.longest("stock") in lengths
    assert arm not in plan.arms or set(lengths) <= set(plan.lengths("enough"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_window_of_two_layers_holds_nine_tenths_of_layers_over_two_times_stocks(plan: ContextPlan) -> None:
    assert plan.longest("window") / plan.longest("stock") >= 0.9 * 16 / 2
    assert plan.longest("window-4") < plan.longest("window-3") < plan.longest("window") <= plan.longest("enough")
    shape = plan.shape("window")
    assert shape.windowed_blocks(plan.longest("stock") // 2) == 0
    found = [shape.windowed_blocks(tokens) for tokens in range(32, plan.longest("window"), 32)]
    assert found == sorted(found)
