"""The ring remembers the last sets, bounded; profiles, signatures and co-access are what counting by hand gives."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polder.errors import ConfigError
from polder.swarm.activations import Activations, IntArray, Profile, co_access
from polder.swarm.generator import PESSIMISTIC, Groups, Sticky, latent_groups, resident, sticky_clusters

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


@settings(deadline=None)
@given(sets, st.floats(0, 0.99))
def test_co_access_has_all_pairs_within_the_distance_nearest_first(values: list[list[int]], radius: float) -> None:
    near = co_access(profile_of(values), max_distance=radius)
    steps = [{step for step, one in enumerate(values) if item in one} for item in range(SIZE)]
    for item in range(SIZE):
        found = near.of(item)
        others = near.others[found].tolist()
        distances = near.distances[found].tolist()
        assert distances == sorted(distances)
        assert near.counts[found].tolist() == [len(steps[item] & steps[other]) for other in others]
        for other in range(SIZE):
            both, either = len(steps[item] & steps[other]), len(steps[item] | steps[other])
            if other == item or not both or abs(1 - both / either - radius) < 1e-5:
                continue
            assert (other in others) is (1 - both / either < radius)


def test_a_distance_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        co_access(profile_of([]), max_distance=1.0)


# ---------------------------------------------------------------- synthetic sets


def test_the_same_seed_gives_the_same_sets_and_another_others() -> None:
    config = Groups(blocks=500, steps=20, seed=3)
    again, other = latent_groups(config), latent_groups(Groups(blocks=500, steps=20, seed=4))
    assert np.array_equal(latent_groups(config).items, again.items)
    assert not np.array_equal(again.items, other.items)


def test_groups_have_their_share_of_blocks_and_change_when_they_are_told_to() -> None:
    still = latent_groups(Groups(blocks=4000, steps=100, seed=1))
    assert np.diff(still.starts).mean() == pytest.approx(400, rel=0.25)
    drifting = latent_groups(Groups(blocks=4000, steps=100, seed=1, drift_step=50))
    assert np.array_equal(still.part(0, 50).items, drifting.part(0, 50).items)
    assert not np.array_equal(still.part(50, 100).items, drifting.part(50, 100).items)


def overlap(profile: Profile) -> float:
    sets = list(profile)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairwise(sets)]))


def test_sticky_sets_keep_what_they_should() -> None:
    config = Sticky(blocks=4000, steps=60, layers=8, window=64)
    layers = sticky_clusters(config)
    assert len(layers) == 8
    always = np.flatnonzero(resident(config))
    assert all(np.isin(always, one).all() for profile in layers for one in profile)
    assert 0.5 < overlap(layers[0]) < 0.98
    # Layers of one group choose alike, those of two groups hardly.
    like, unlike = (
        np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(layers[0], layers[other], strict=True)])
        for other in (1, 4)
    )
    assert like > unlike + 0.1
    (harsh,) = sticky_clusters(Sticky(blocks=4000, steps=60, window=64, keep_share=PESSIMISTIC.keep_share, zipf=0.8))
    assert overlap(harsh) < overlap(sticky_clusters(Sticky(blocks=4000, steps=60, window=64, keep_share=0.9))[0])


def test_a_share_above_1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise_share is 1\.5"):
        Groups(blocks=10, steps=1, noise_share=1.5)
