"""The cut is the best of all cuts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polder.planner.gate import best_cut
from tests.conftest import examples

TOKENS = 16
links = st.lists(st.integers(0, 2), max_size=20)
costs = st.dictionaries(st.integers(0, 2), st.floats(0, 1e-6))
queues = st.dictionaries(st.integers(0, 2), st.floats(0, 1e7))


def seconds(
    count: int,
    links: list[int],
    block: float,
    costs: dict[int, float],
    queued: dict[int, float],
    token: float,
    fixed: float,
) -> float:
    """Until a request whose first `count` blocks are loaded has all of them; as the module's docstring says."""
    waits = [0.0]
    for link in set(links[:count]):
        waits.append(costs.get(link, 0.0) * (queued.get(link, 0.0) + links[:count].count(link) * block))
    return (fixed if count else 0.0) + max(waits) + (len(links) - count) * TOKENS * token


@examples(150, derandomize=True)
@given(links, st.floats(1, 1e6), costs, queues, st.floats(0, 1e-3), st.floats(0, 0.01))
def test_no_other_cut_is_better(
    links: list[int], block: float, costs: dict[int, float], queued: dict[int, float], token: float, fixed: float
) -> None:
    cut = best_cut(
        np.array(links, dtype=np.int64),
        block_bytes=block,
        block_tokens=TOKENS,
        seconds_per_byte=costs,
        queued_bytes=queued,
        seconds_per_token=token,
        overhead_s=fixed,
    )
    times = [seconds(count, links, block, costs, queued, token, fixed) for count in range(len(links) + 1)]
    tolerance = 1e-9 * max(1.0, *times)
    assert times[cut.blocks] <= min(times) + tolerance
    # What is expected of it is what the comparison was made with.
    assert abs(cut.load_s + (len(links) - cut.blocks) * TOKENS * token - times[cut.blocks]) <= tolerance
    assert abs(cut.recompute_s - cut.blocks * TOKENS * token) <= tolerance


def cut(tiers: list[int], costs: dict[int, float], queued: dict[int, float] | None = None, token: float = 1e-4) -> int:
    return best_cut(
        np.array(tiers, dtype=np.int64),
        block_bytes=1e6,
        block_tokens=TOKENS,
        seconds_per_byte=costs,
        queued_bytes=queued or {},
        seconds_per_token=token,
        overhead_s=0.001,
    ).blocks


def test_a_link_slower_than_computing_is_not_used() -> None:
    assert cut([1] * 10, {1: 1e-8}) == 0


def test_the_head_on_a_fast_link_is_loaded_and_the_tail_on_a_slow_one_computed() -> None:
    assert cut([0] * 5 + [1] * 5, {0: 1e-10, 1: 1e-7}) == 5


def test_a_link_that_was_never_measured_is_tried() -> None:
    assert cut([2] * 10, {}) == 10


def test_a_link_with_a_long_queue_is_not_waited_for() -> None:
    assert cut([0] * 10, {0: 1e-10}) == 10
    assert cut([0] * 10, {0: 1e-10}, {0: 1e10}) == 0


def test_of_equal_cuts_the_longest_load_is_chosen() -> None:
    found = best_cut(
        np.zeros(4, dtype=np.int64),
        block_bytes=1.0,
        block_tokens=TOKENS,
        seconds_per_byte={},
        queued_bytes={},
        seconds_per_token=0.0,
        overhead_s=0.0,
    )
    assert found.blocks == 4
    assert cut([2] * 4, {}, token=0.0) == 0  # the fixed cost counts


def test_nothing_found_is_nothing_loaded() -> None:
    assert cut([], {}) == 0
