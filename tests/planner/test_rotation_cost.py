"""No more is streamed than the formulas permit, and no less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.planner.rotation_cost import (
    choose_rotation,
    double_buffer_hides,
    loads_hidden,
    most_streamed,
    most_streamed_within,
    pass_seconds,
    single_slot_hides,
    step_seconds,
)

seconds = st.floats(1e-5, 1.0)
counts = st.integers(1, 80)
HBM, PCIE, C2C = 4.2e12, 55e9, 375e9
LLAMA_LAYER = 436_000_000


@given(seconds, seconds)
def test_as_many_loads_are_hidden_as_fit_the_pass(load_s: float, compute_s: float) -> None:
    loads = loads_hidden(load_s, compute_s)
    assert load_s * loads <= compute_s
    assert load_s * (loads + 1) > compute_s * (1 - 1e-9)


def test_a_load_that_was_never_measured_is_not_hidden() -> None:
    assert loads_hidden(0.0, 1.0) == 0


@pytest.mark.parametrize(("link", "most"), [(PCIE, 1), (C2C, 10)])
def test_the_table_of_links_is_met(link: float, most: int) -> None:
    """64 sequences of 4K tokens of an 8B model, a step of 11.5 ms: 1.5 layers by PCIe, somewhat under 12.8 by C2C at 3.75 TB/s."""
    found = most_streamed(32, 11.5e-3, LLAMA_LAYER, HBM, link)
    assert most <= found <= most + 1


@given(seconds, st.floats(1e6, 1e9), st.floats(1e9, 1e13), st.floats(1e8, 1e12), counts)
def test_the_step_never_waits_for_the_link(t0: float, size: float, memory: float, link: float, layers: int) -> None:
    most = most_streamed(layers, t0, int(size), memory, link)
    slower = step_seconds(t0, most, int(size), memory, link)
    if link < memory:
        assert slower <= (t0 + most * int(size) / memory) * (1 + 1e-9)
    assert 0 <= most <= layers


@given(seconds, seconds, st.floats(1e6, 1e9), st.floats(1e9, 1e13), st.floats(1e8, 1e12), counts)
def test_a_promised_step_time_is_kept_and_used(
    target: float, t0: float, size: float, memory: float, link: float, layers: int
) -> None:
    most = most_streamed_within(layers, target, t0, int(size), memory, link)
    if most:
        assert step_seconds(t0, most, int(size), memory, link) <= target * (1 + 1e-9)
    if t0 <= target and most < layers:
        assert step_seconds(t0, most + 1, int(size), memory, link) > target * (1 - 1e-9)


@given(counts, seconds, seconds, st.sampled_from([0.0, 0.05, 0.5]))
def test_a_chosen_rotation_is_permitted_and_no_other_wins_more(
    layers: int, step_s: float, load_s: float, slowdown: float
) -> None:
    alpha, rotating, slots = choose_rotation(layers, step_s, load_s, slowdown)
    allowed = step_s * (1 + slowdown)
    if alpha:
        assert rotating == alpha + slots <= layers
        assert pass_seconds(layers, rotating, slots, step_s, load_s) <= allowed
    if alpha and slowdown == 0:
        hides = single_slot_hides if slots == 1 else double_buffer_hides
        assert hides(layers, rotating, load_s, step_s / layers * (1 + 1e-9))
        assert rotating <= loads_hidden(load_s, step_s * (1 + 1e-9))
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
