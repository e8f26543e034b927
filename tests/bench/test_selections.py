"""Stages and arms that the user names: what would run nothing is refused before anything is started."""

from __future__ import annotations

import pytest

from polder.bench.disks_plan import FULL_DISKS, QUICK_DISKS, DisksPlan
from polder.bench.turns_plan import ARMS, FULL_TURNS, QUICK_TURNS, RESTART_ARMS, STAGES, TurnsPlan
from polder.errors import ConfigError


@pytest.mark.parametrize(
    ("plan", "stages", "arms", "words"),
    [
        (
            FULL_TURNS,
            ["restart"],
            ["polder"],
            "stage restart has nothing to run of polder: name some of stock, native-fs, polder-d",
        ),
        (FULL_TURNS, ["noreuse"], ["polder"], "stage noreuse has nothing to run of polder: name all of stock, polder"),
        (
            QUICK_TURNS,
            ["agents", "lender"],
            ["stock", "native"],
            "stage lender has nothing to run of stock, native: name all of stock, polder",
        ),
        (
            QUICK_TURNS,
            ["chat"],
            ["native-fs"],
            "stage chat has nothing to run of native-fs: name some of stock, native",
        ),
        (
            FULL_TURNS,
            ["equality"],
            ["stock"],
            "stage equality has nothing to run of stock: name some of native, polder-host",
        ),
        (FULL_DISKS, ["wall"], ["swarm"], "stage wall has nothing to run of swarm: name some of hash, fixed-blocks"),
        (QUICK_DISKS, ["model", "wall"], ["raid0"], "stage wall has nothing to run of raid0: name some of hash"),
    ],
)
def test_a_named_stage_without_an_arm_is_refused(
    plan: TurnsPlan | DisksPlan, stages: list[str], arms: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan.only(stages=stages, arms=arms)


@pytest.mark.parametrize("plan", [FULL_TURNS, QUICK_TURNS])
@pytest.mark.parametrize("arm", dict.fromkeys((*ARMS, *RESTART_ARMS)))
def test_of_the_plans_own_stages_those_without_an_arm_are_left_out(plan: TurnsPlan, arm: str) -> None:
    chosen = plan.only(arms=[arm])
    runs = {
        "agents": chosen.agents_order,
        "chat": chosen.chat_order,
        "restart": chosen.restart_order,
        "equality": set(chosen.equality_arms) - {"stock"},
    }
    assert chosen.stages == tuple(stage for stage in plan.stages if runs.get(stage))
    assert chosen.stages


def test_both_arms_of_a_comparison_are_enough() -> None:
    assert FULL_TURNS.only(stages=STAGES, arms=["stock", "polder"]).stages == STAGES


def test_stages_are_left_out_without_their_arms() -> None:
    assert FULL_DISKS.only(arms=["swarm"]).stages == ("model", "shares")
    assert FULL_DISKS.only(arms=["swarm", "hash"]).stages == ("model", "shares", "wall")
    assert FULL_DISKS.only(stages=["live"], arms=["swarm"]).stages == ("live",)
