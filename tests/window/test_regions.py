"""As few donors as let the longest context in, and never one more unit than there are pages for."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polder.errors import BudgetError
from polder.window.regions import WindowShape

LAYERS = st.integers(2, 48)
SHAPES = LAYERS.flatmap(
    lambda layers: st.builds(
        WindowShape, layers=st.just(layers), window_layers=st.integers(1, layers // 2), store_units=st.integers(0, 120)
    )
)
HELD = st.integers(1, 40)
WANTED = st.integers(1, 300)


@given(shape=SHAPES, held=HELD, share=st.floats(0.0, 1.0))
def test_room_is_what_the_pages_are_enough_for(shape: WindowShape, held: int, share: float) -> None:
    donors = int(share * (held - 1))
    room = shape.room(held, donors)
    slots = donors * shape.layers // shape.window_layers * shape.window_layers
    windowed = room - (held - donors)
    assert 0 <= windowed <= shape.store_units
    assert windowed * shape.window_layers <= slots, "each windowed unit has w layers' pages of one donor"
    assert windowed in (shape.store_units, donors * (shape.layers // shape.window_layers))


@pytest.mark.parametrize(
    ("layers", "window_layers", "each"),
    [(32, 2, 16), (32, 3, 10), (7, 2, 3), (7, 3, 2), (5, 1, 5), (4, 4, 1), (5, 3, 1)],
)
def test_layers_that_fill_no_whole_window_carry_nothing(layers: int, window_layers: int, each: int) -> None:
    shape = WindowShape(layers=layers, window_layers=window_layers, store_units=1000)
    assert shape.units_of_donor == each
    assert shape.room(10, 4) == 6 + 4 * each


@given(shape=SHAPES, held=HELD, wanted=WANTED)
def test_donors_are_the_fewest_that_do_and_one_unit_stays_regular(shape: WindowShape, held: int, wanted: int) -> None:
    donors = shape.donors_for(held, wanted)
    possible = [c for c in range(held) if shape.room(held, c) >= wanted]
    assert donors == (min(possible) if possible else None)
    if wanted <= held:
        assert donors == 0, "what fits needs no window"


@given(shape=SHAPES, held=HELD, wanted=WANTED)
def test_a_longer_context_needs_no_fewer_donors_and_more_memory_no_more(
    shape: WindowShape, held: int, wanted: int
) -> None:
    donors = shape.donors_for(held, wanted)
    longer, richer = shape.donors_for(held, wanted + 1), shape.donors_for(held + 1, wanted)
    if longer is not None:
        assert donors is not None
        assert donors <= longer
    if donors is not None:
        assert richer is not None
        assert richer <= donors
    assert shape.most(held) < shape.most(held + 1)


@given(shape=SHAPES, held=HELD)
def test_most_is_reached_and_nothing_more(shape: WindowShape, held: int) -> None:
    most = shape.most(held)
    donors = shape.donors_for(held, most)
    assert donors is not None
    assert shape.room(held, donors) == most
    assert shape.donors_for(held, most + 1) is None


@given(shape=SHAPES, held=HELD, unit_blocks=st.integers(1, 8), blocks=st.integers(1, 2000))
def test_a_contexts_blocks_are_regular_where_there_is_room_and_else_in_open_units(
    shape: WindowShape, held: int, unit_blocks: int, blocks: int
) -> None:
    assume(blocks + 1 <= shape.most(held) * unit_blocks)
    windowed = shape.windowed_blocks(blocks, held, unit_blocks)
    assert 0 <= windowed <= shape.store_units * unit_blocks
    if -(-(blocks + 1) // unit_blocks) < held:
        assert windowed == 0
    if blocks + 2 <= shape.most(held) * unit_blocks:
        assert windowed <= shape.windowed_blocks(blocks + 1, held, unit_blocks)


@given(shape=SHAPES, held=HELD)
def test_without_a_store_there_is_what_is_held(shape: WindowShape, held: int) -> None:
    bare = WindowShape(layers=shape.layers, window_layers=shape.window_layers, store_units=0)
    assert bare.most(held) == held
    assert bare.donors_for(held, held + 1) is None


@given(shape=SHAPES, ceiling=HELD, wanted=WANTED)
def test_the_least_held_is_enough_and_one_less_is_not(shape: WindowShape, ceiling: int, wanted: int) -> None:
    assume(wanted <= shape.most(ceiling))
    held = shape.least_held(wanted, ceiling)
    assert 1 <= held <= ceiling
    assert shape.most(held) >= wanted
    assert held == 1 or shape.most(held - 1) < wanted


@given(shape=SHAPES, ceiling=HELD, more=st.integers(1, 50))
def test_what_has_no_room_is_refused_with_the_numbers(shape: WindowShape, ceiling: int, more: int) -> None:
    most = shape.most(ceiling)
    with pytest.raises(BudgetError) as refused:
        shape.least_held(most + more, ceiling)
    numbers = (most + more, ceiling, shape.store_units, most, shape.window_layers, shape.layers)
    assert all(f" {number} " in f" {refused.value} " for number in numbers)
