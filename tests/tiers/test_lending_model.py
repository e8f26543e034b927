"""Every reachable state of the lending protocol; and without any one of its rules the same search finds the harm."""

from __future__ import annotations

import pytest

from tests.tiers.protocol import LENDER, Scenario, Violation, explore

ONE_LOT = ((0, 0), (0, 0))
"""Two borrowers, each block one whole lot, and there is one lot."""

STALE = tuple(
    step
    for lot, first, second in ((0, 2, 1), (1, 1, 2))
    for step in (
        (LENDER, "offer.begin", lot),
        (first, "look", lot),
        (LENDER, "take.w.recalled", lot),
        (LENDER, "offer.begin", lot),
        (second, "look", lot),
    )
)
"""Both borrowers believe that they have lots 0 and 1, and each is wrong about another one."""

SCENARIOS = {
    "lent twice": Scenario(blocks=ONE_LOT, lots=1, offers=2, writes=1, filtered=True),
    "released": Scenario(blocks=ONE_LOT, lots=1, offers=1, writes=1, releases=1),
    "written twice": Scenario(blocks=ONE_LOT, lots=1, offers=1, writes=2, releases=0),
    "released and lent twice": Scenario(blocks=((0, 0),), lots=1, offers=2, writes=2, releases=2),
    "a block over two lots": Scenario(blocks=((0, 1), (1, 1)), lots=2, offers=2, writes=1, filtered=True),
    "stale claims": Scenario(blocks=((0, 1), (0, 1)), lots=2, offers=4, writes=1, filtered=True, before=STALE),
}
STATES = {
    "lent twice": 129605,
    "released": 104980,
    "written twice": 40628,
    "released and lent twice": 90862,
    "a block over two lots": 219026,
    "stale claims": 58978,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_guarantees_hold_in_every_reachable_state(name: str) -> None:
    states, _ = explore(SCENARIOS[name])
    assert states == STATES[name], "the model has changed: see that it still says what lending.py does"


def mutant(rule: str, **changes: object) -> Scenario:
    return Scenario(**{"blocks": ONE_LOT, "lots": 1, "offers": 1, "writes": 1, "mutant": rule, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scenario", "harm"),
    [
        (mutant("no_lock_around_write"), "writes into"),
        (mutant("epoch_before_lock"), "writes into"),
        (mutant("no_comparison_after_read"), "takes bytes"),
        (mutant("claim_without_lock"), "two holders"),
        (mutant("epoch_not_raised"), "which is the lender's own"),
        (mutant("epoch_goes_back", blocks=((0, 0),), offers=2), "takes bytes"),
        (mutant("release_keeps_epoch", releases=1), "takes bytes"),
        (mutant("told_by_holder", releases=1), "does not know of a borrower's bytes"),
        (mutant("told_by_holder", blocks=((0, 0),), offers=2), "does not know of a borrower's bytes"),
        (mutant("no_recalled_flag"), "the lender starves"),
        (mutant("kill_by_mark"), "does not know whom to kill"),
        (mutant("dead_writer_ignored"), "after take_back has returned"),
        (
            mutant("any_order", blocks=((0, 1), (0, 1)), lots=2, offers=4, filtered=True, before=STALE),
            "wait for each other",
        ),
    ],
    ids=lambda value: value.mutant if isinstance(value, Scenario) else "",
)
def test_no_rule_can_be_left_out(scenario: Scenario, harm: str) -> None:
    with pytest.raises(Violation, match=harm):
        explore(scenario)
