"""The ring remembers the last sets, bounded; profiles and signatures are what counting by hand gives."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polder.arrays import IntArray
from polder.errors import ConfigError
from polder.swarm.activations import Activations, Profile

SIZE = 12
sets = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=8), max_size=40)


def ids(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def profile_of(values: list[list[int]]) -> Profile:
    return Profile.of([ids(sorted(set(one))) for one in values], size=SIZE)


@settings(deadline=None)
@given(sets, st.integers(1, 6), st.integers(1, 20))
def test_the_ring_holds_the_last_sets_that_fit(values: list[list[int]], max_steps: int, max_items: int) -> None:
    ring = Activations(SIZE, max_steps=max_steps, max_items=max_items)
    model: deque[set[int]] = deque()
    refused = 0
    for one in values:
        ring.record(ids(one))
        if len(set(one)) > max_items:
            refused += 1
            continue
        model.append(set(one))
        while len(model) > max_steps or sum(len(kept) for kept in model) > max_items:
            model.popleft()
        assert [set(kept.tolist()) for kept in ring.profile()] == list(model)
        assert len(ring.profile().items) == sum(len(kept) for kept in model)
    assert ring.refused == refused


def test_ids_outside_are_refused() -> None:
    with pytest.raises(ConfigError, match="ids from -1 to 3 in a ring of 12"):
        Activations(SIZE).record(ids([3, -1]))
    with pytest.raises(ConfigError, match="profile of 3"):
        Profile.of([ids([3])], size=3)


@settings(deadline=None)
@given(sets)
def test_a_profile_reads_the_same_from_all_sides(values: list[list[int]]) -> None:
    profile = profile_of(values)
    wanted = [sorted(set(one)) for one in values]
    assert [one.tolist() for one in profile] == wanted
    starts, steps = profile.by_id()
    signatures = profile.signatures()
    for item in range(SIZE):
        mine = [step for step, one in enumerate(wanted) if item in one]
        assert steps[starts[item] : starts[item + 1]].tolist() == mine
        assert profile.counts()[item] == len(mine) == int(np.bitwise_count(signatures[item]).sum())
    middle = profile.part(1, max(1, profile.steps - 1))
    assert [one.tolist() for one in middle] == wanted[1 : max(1, len(wanted) - 1)]


@settings(deadline=None)
@given(sets, st.lists(st.integers(-1, 4), min_size=SIZE, max_size=SIZE))
def test_mapped_sets_have_each_place_once_and_leave_out_what_has_none(
    values: list[list[int]], places: list[int]
) -> None:
    mapped = profile_of(values).mapped(ids(places), size=5)
    expected = [sorted({places[item] for item in one if places[item] >= 0}) for one in values]
    assert [one.tolist() for one in mapped] == expected
