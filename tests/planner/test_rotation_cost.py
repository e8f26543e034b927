"""No more is streamed than the formulas permit, and no less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.planner.rotation_cost import choose_rotation, pass_seconds

seconds = st.floats(1e-5, 1.0)
counts = st.integers(1, 80)


@given(counts, seconds, seconds, st.sampled_from([0.0, 0.05, 0.5]))
def test_a_chosen_rotation_is_permitted_and_no_other_wins_more(
    layers: int, step_s: float, load_s: float, slowdown: float
) -> None:
    alpha, rotating, slots = choose_rotation(layers, step_s, load_s, slowdown)
    allowed = step_s * (1 + slowdown)
    if alpha:
        assert rotating == alpha + slots <= layers
        assert pass_seconds(layers, rotating, slots, step_s, load_s) <= allowed
    for other in (1, 2):
        if alpha + 1 + other <= layers:
            assert pass_seconds(layers, alpha + 1 + other, other, step_s, load_s) > allowed


def test_a_slow_link_rotates_nothing_and_a_fast_one_double_buffers() -> None:
    assert choose_rotation(40, 6.5e-3, 12.5e-3).alpha == 0
    assert choose_rotation(40, 0.2, 0.0).alpha == 0
    assert choose_rotation(40, 30e-3, 30e-3 / 4) == (2, 3, 1)
    fast = choose_rotation(40, 30e-3, 1.5e-3)
    assert (fast.slots, fast.rotating) == (2, 20)


def test_of_rotations_that_win_as_much_the_one_that_streams_less_is_chosen() -> None:
    """Eight layers, a load as long as two of them: two layers through one slot win as much as three through two."""
    assert choose_rotation(8, 8e-3, 2e-3 * 1.2) == (1, 2, 1)


def test_a_slowdown_that_is_allowed_wins_more() -> None:
    assert choose_rotation(40, 20e-3, 2e-3, 0.5).alpha > choose_rotation(40, 20e-3, 2e-3).alpha


def test_copies_that_take_the_cores_time_are_not_free() -> None:
    assert choose_rotation(12, 20e-3, 1e-3, 0.02).alpha == 10
    assert choose_rotation(12, 20e-3, 1e-3, 0.02, copy_share=0.016).alpha == 10, "a GPU's copy engine"
    assert choose_rotation(12, 20e-3, 1e-3, 0.02, copy_share=0.5).alpha == 0, "one of two cores"
    assert pass_seconds(12, 4, 2, 20e-3, 1e-3, copy_share=0.5) == pytest.approx(22e-3)
