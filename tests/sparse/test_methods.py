"""All methods give shares of one softmax, and bounds are bounds."""

from __future__ import annotations

import numpy as np
import pytest

from polder.sparse.methods import METHODS, Method, index_of, order_of

UNIT, UNITS, D = 8, 12, 16


def drawn(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_shares_add_up_to_one_and_find_a_unit_that_the_query_needs(method: Method) -> None:
    keys, exact, query = drawn(2, UNIT * UNITS, D) * 0.1, drawn(2, 20, D) * 0.1, drawn(4, D)
    keys[:, 40:48] = 4 * query[::2, None]  # one neighbourhood, of equal keys, that the query points to
    moment = np.stack([np.eye(D, dtype=np.float32)] * 2)
    order = order_of(method, keys, moment, UNIT)
    assert sorted(order.tolist()) == list(range(UNIT * UNITS))
    index = index_of(method, keys[:, order], UNIT)
    shares, rest = index.shares(query, exact, 17, scale=0.25)
    assert abs(shares.sum() + rest - 1) < 1e-3
    assert set(order.reshape(UNITS, UNIT)[shares.argmax()].tolist()) == set(range(40, 48))


def test_a_bound_is_at_least_the_logit_of_each_token() -> None:
    keys, query = drawn(1, UNIT * UNITS, D), drawn(1, D)
    none = np.zeros((1, 1, D), np.float32)
    shares, rest = index_of("quest", keys, UNIT).shares(query, none, 1, scale=1.0)
    bounds = np.log(shares / rest) - np.log(UNIT)
    logits = (keys[0] @ query[0]).reshape(UNITS, UNIT)
    assert (bounds >= logits.max(axis=1) - 1e-3).all()
