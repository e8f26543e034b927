"""Bisection is a permutation into whole units, whose keys lie near each other in the metric of the queries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.sparse.ordering import bisect, query_metric
from tests.conftest import examples


@examples(30)
@given(seed=st.integers(0, 2**32), units=st.integers(0, 30), size=st.sampled_from([1, 3, 16]), d=st.integers(1, 40))
def test_an_order_is_a_permutation(seed: int, units: int, size: int, d: int) -> None:
    points = np.random.default_rng(seed).standard_normal((units * size, d)).astype(np.float32)
    assert sorted(bisect(points, size).tolist()) == list(range(units * size))


def test_rows_that_are_no_whole_units_are_refused() -> None:
    with pytest.raises(ValueError, match="not whole units"):
        bisect(np.zeros((17, 4), np.float32), 16)


def test_equal_keys_share_their_units_wherever_they_stood() -> None:
    random = np.random.default_rng(3)
    kinds = random.permutation(np.repeat(np.arange(8), 16))
    points = random.standard_normal((8, 24)).astype(np.float32)[kinds]
    for unit in kinds[bisect(points, 16)].reshape(-1, 16):
        assert len(set(unit.tolist())) == 1


def test_the_metric_measures_the_error_of_logits() -> None:
    random = np.random.default_rng(4)
    queries = (random.standard_normal((500, 12)) * np.linspace(0.1, 4, 12)).astype(np.float32)
    root = query_metric(queries.T @ queries / len(queries))
    difference = random.standard_normal(12).astype(np.float32)
    error = ((queries @ difference) ** 2).mean()
    assert np.isclose(((difference @ root) ** 2).sum(), error, rtol=0.05)
