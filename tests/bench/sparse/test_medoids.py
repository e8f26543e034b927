"""Swarm's clusters keep to its equations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polder.bench.sparse.medoids import co_access, medoid_clusters
from polder.errors import ConfigError
from polder.swarm.activations import Profile

SIZE = 16
sets = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=10), min_size=1, max_size=30)


def profile_of(values: list[list[int]]) -> Profile:
    return Profile.of([np.unique(np.array(one, dtype=np.int64)) for one in values], size=SIZE)


def distances(values: list[list[int]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    steps = [{step for step, one in enumerate(values) if item in one} for item in range(SIZE)]
    return np.array([[1 - len(a & b) / max(1, len(a | b)) for b in steps] for a in steps])


@settings(deadline=None)
@given(sets, st.floats(0.05, 0.95))
def test_clusters_cover_what_was_read_within_the_radius(values: list[list[int]], radius: float) -> None:
    clusters = medoid_clusters(profile_of(values), radius=radius)
    apart = distances(values)
    covered: set[int] = set()
    for cluster in range(clusters.count):
        members = clusters.members[clusters.starts[cluster] : clusters.starts[cluster + 1]].tolist()
        assert len(set(members)) == len(members)
        assert members[0] == clusters.medoids[cluster]
        assert members[0] not in covered  # only what nobody covers becomes a medoid
        covered.update(members)
        for position in range(1, len(members)):
            member, present = members[position], members[:position]
            assert apart[member, members[0]] <= radius + 1e-5
            assert apart[member, present].mean() <= radius + 1e-5  # equation (5)
    assert covered == {item for one in values for item in one}


def test_a_with_b_and_a_with_c_but_not_b_with_c_stores_a_twice() -> None:
    """The paper's reason for replicas: A with B, A with C, never B with C. C's cluster takes A again."""
    together = [[0, 1], [0, 1], [0, 2], [0, 2], [3]]
    clusters = medoid_clusters(profile_of(together), radius=0.5)
    members = [set(part.tolist()) for part in np.split(clusters.members, clusters.starts[1:-1])]
    assert members == [{0, 1}, {2, 0}, {3}]


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
        for other in range(SIZE):
            both, either = len(steps[item] & steps[other]), len(steps[item] | steps[other])
            if other == item or not both or abs(1 - both / either - radius) < 1e-5:
                continue
            assert (other in others) is (1 - both / either < radius)


def test_a_distance_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        co_access(profile_of([]), max_distance=1.0)


@given(st.sampled_from([1.0, -0.1]))
def test_a_radius_that_is_none_is_refused(radius: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        medoid_clusters(profile_of([[0]]), radius=radius)
