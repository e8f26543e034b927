"""Units are selected as by the plain formula, and from codes within half a step of the keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from polder.sparse.codes import encode
from polder.sparse.selection import best, unit_shares
from tests.conftest import examples

Floats = npt.NDArray[np.float32]


def drawn(seed: int, *shape: int, spread: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def plain_shares(query: Floats, keys: Floats, exact: Floats, scale: float, unit: int) -> tuple[Floats, float]:
    heads, kv_heads = len(query), len(keys)
    shares, rest = np.zeros(keys.shape[1] // unit), 0.0
    for head in range(heads):
        every = np.concatenate([keys[head * kv_heads // heads], exact[head * kv_heads // heads]])
        logits = every.astype(np.float64) @ query[head].astype(np.float64) * scale
        share = np.exp(logits - logits.max())
        share /= share.sum() * heads
        shares += share[: keys.shape[1]].reshape(-1, unit).sum(axis=1)
        rest += share[keys.shape[1] :].sum()
    return shares.astype(np.float32), rest


@examples(30)
@given(
    seed=st.integers(0, 2**32),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 16),
    units=st.integers(1, 40),
    unit=st.sampled_from([1, 4, 16, 32]),
    rests=st.integers(1, 30),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_shares_are_those_of_the_plain_formula(
    seed: int, kv_heads: int, group: int, half: int, units: int, unit: int, rests: int, spread: float
) -> None:
    d = 2 * half
    keys, exact = drawn(seed, kv_heads, units * unit, d, spread=spread), drawn(seed + 1, kv_heads, rests + 3, d)
    query, codes = drawn(seed + 2, kv_heads * group, d, spread=spread), encode(keys)
    found, rest = unit_shares(query, codes, exact, rests, scale=d**-0.5, unit=unit)
    expected, expected_rest = plain_shares(query, codes.decode(), exact[:, :rests], d**-0.5, unit)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert abs(rest - expected_rest) < 2e-4
    assert abs(found.sum() + rest - 1) < 1e-4


@examples(30)
@given(
    seed=st.integers(0, 2**32), heads=st.integers(1, 3), tokens=st.integers(1, 70), spread=st.floats(0, 1e3, width=32)
)
def test_a_code_is_within_half_a_step_of_its_key(seed: int, heads: int, tokens: int, spread: float) -> None:
    keys = drawn(seed, heads, tokens, 8, spread=spread)
    codes = encode(keys)
    assert (np.abs(codes.decode() - keys) <= codes.step[:, None] * 0.501 + 1e-6).all()
    assert codes.nibbles.size * 2 == keys.size


@examples(30)
@given(seed=st.integers(0, 2**32), units=st.integers(1, 300), count=st.integers(0, 400))
def test_the_best_units_are_those_of_the_highest_shares_and_100_percent_are_all(
    seed: int, units: int, count: int
) -> None:
    shares = np.abs(drawn(seed, units))
    found = best(shares, count)
    assert len(found) == len(set(found.tolist())) == min(count, units)
    np.testing.assert_array_equal(shares[found], np.sort(shares)[::-1][: len(found)])
