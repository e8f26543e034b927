"""Law 1 for the ledger: free + owned = total on every device, whatever is asked of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polder.broker.ledger import Ledger, Owner
from polder.errors import IntegrityError, OutOfPages, ProtocolError
from tests.conftest import examples

A, B = Owner("a", "kv"), Owner("b", "weights")


def test_taking_more_than_is_free_takes_nothing() -> None:
    ledger = Ledger({"cpu:0": 10})
    ledger.take("cpu:0", A, 7)
    with pytest.raises(OutOfPages):
        ledger.take("cpu:0", B, 4)
    assert ledger.free("cpu:0") == 3
    ledger.check_integrity()


@pytest.mark.parametrize("pages", [[0, 1, 2], [5], [-1], [10], [3, 3]])
def test_giving_back_what_one_does_not_hold_changes_nothing(pages: list[int]) -> None:
    ledger = Ledger({"cpu:0": 10})
    ledger.take("cpu:0", B, 2)  # pages 0 and 1
    ledger.take("cpu:0", A, 3)  # pages 2 to 4
    with pytest.raises(ProtocolError):
        ledger.give_back("cpu:0", A, pages)
    assert ledger.held("cpu:0", A) == 3
    ledger.check_integrity()


def test_claiming_a_page_that_is_taken_changes_nothing() -> None:
    ledger = Ledger({"cpu:0": 10})
    ledger.take("cpu:0", A, 3)
    with pytest.raises(ProtocolError):
        ledger.claim("cpu:0", B, [2, 3])
    assert ledger.held("cpu:0", B) == 0


def test_a_wrong_count_is_noticed() -> None:
    ledger = Ledger({"cpu:0": 10})
    ledger.take("cpu:0", A, 3)
    ledger._devices["cpu:0"].owner_of[9] = 1
    with pytest.raises(IntegrityError):
        ledger.check_integrity()


class LedgerMachine(RuleBasedStateMachine):
    """Random calls against a dictionary of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger({"cpu:0": 12, "cuda:0": 5})
        self.model: dict[tuple[str, Owner], set[int]] = {}

    devices = st.sampled_from(["cpu:0", "cuda:0"])
    owners = st.sampled_from([A, B, Owner("a", "lent")])

    def mine(self, device: str, owner: Owner) -> set[int]:
        return self.model.setdefault((device, owner), set())

    @rule(device=devices, owner=owners, count=st.integers(0, 13))
    def take(self, device: str, owner: Owner, count: int) -> None:
        free = self.ledger.free(device)
        if count > free:
            with pytest.raises(OutOfPages):
                self.ledger.take(device, owner, count)
            return
        pages = set(self.ledger.take(device, owner, count).tolist())
        assert len(pages) == count
        assert not any(pages & held for (d, _), held in self.model.items() if d == device)
        self.mine(device, owner).update(pages)

    @rule(device=devices, owner=owners, data=st.data())
    def give_back(self, device: str, owner: Owner, data: st.DataObject) -> None:
        held = self.mine(device, owner)
        if held:
            pages = data.draw(st.sets(st.sampled_from(sorted(held))))
            self.ledger.give_back(device, owner, sorted(pages))
            held -= pages

    @rule(device=devices, owner=owners, pages=st.sets(st.integers(0, 11), min_size=1))
    def claim(self, device: str, owner: Owner, pages: set[int]) -> None:
        taken = set().union(*(held for (d, _), held in self.model.items() if d == device))
        if max(pages) < self.ledger.total(device) and not pages & taken:
            self.ledger.claim(device, owner, sorted(pages))
            self.mine(device, owner).update(pages)
        else:
            with pytest.raises(ProtocolError):
                self.ledger.claim(device, owner, sorted(pages))

    @rule(owner=owners)
    def forget(self, owner: Owner) -> None:
        self.ledger.forget(owner)
        for (_, who), held in self.model.items():
            if who == owner:
                held.clear()

    @invariant()
    def conserves(self) -> None:
        self.ledger.check_integrity()
        for (device, owner), held in self.model.items():
            assert set(self.ledger.pages_of(device, owner).tolist()) == held
        for device in self.ledger.devices:
            numbers = self.ledger.statistics(device)
            assert numbers.free + sum(numbers.by_owner.values()) == numbers.total


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = examples(60, steps=40)


def test_ten_thousand_pages_change_hands_in_arrays() -> None:
    ledger = Ledger({"cuda:0": 40_000})
    pages = ledger.take("cuda:0", A, 10_000)
    assert np.array_equal(pages, np.arange(10_000)), "lowest first, so neighbours stay neighbours"
    ledger.give_back("cuda:0", A, pages)
    assert ledger.free("cuda:0") == 40_000
