"""Slots hold what was wanted last, never the same unit twice, and what could not be read replaces nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polder.sparse.slots import Slots
from tests.conftest import examples


@examples(40)
@given(data=st.data(), units=st.integers(1, 40), count=st.integers(1, 40))
def test_selected_units_that_could_be_read_are_there_and_each_once(data: st.DataObject, units: int, count: int) -> None:
    count = min(count, units)
    slots = Slots(units, count)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    slots.fill(random.permutation(units)[:count])
    for _ in range(20):
        selected = random.permutation(units)[: data.draw(st.integers(1, count))]
        before = slots.unit_of.copy()
        missing, places = slots.want(selected)
        assert set(missing.tolist()) == set(selected.tolist()) - set(before.tolist())
        assert not set(before[places].tolist()) & set(selected.tolist())
        read = random.random(len(missing)) < 0.8
        slots.put(missing[read], places[read])
        assert set(slots.unit_of.tolist()) >= set(selected.tolist()) - set(missing[~read].tolist())
        np.testing.assert_array_equal(slots.unit_of[places[~read]], before[places[~read]])
        assert len(set(slots.unit_of.tolist())) == count
        there = np.flatnonzero(slots.slot_of >= 0)
        np.testing.assert_array_equal(slots.unit_of[slots.slot_of[there]], there)
        assert len(there) == count


def test_the_least_recently_selected_unit_makes_room() -> None:
    slots = Slots(5, 3)
    for unit in (1, 0, 2):
        slots.want(np.array([unit]))
    missing, places = slots.want(np.array([4]))
    assert (missing.tolist(), slots.unit_of[places].tolist()) == ([4], [1])
