"""Rotations: even on the circle, each layer in one home, and the arithmetic of segments."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.errors import ConfigError
from polder.weights.rotation import Rotation, spread


@st.composite
def rotations(draw: st.DrawFn) -> Rotation:
    slots = draw(st.integers(1, 3))
    layers = draw(st.integers(2 * slots, 130))
    return Rotation.winning(layers, draw(st.integers(slots, layers - slots)), slots=slots)


@given(data=st.data(), layers=st.integers(1, 200))
def test_gaps_on_the_circle_differ_by_one_at_most(data: st.DataObject, layers: int) -> None:
    count = data.draw(st.integers(1, layers))
    chosen = spread(layers, count)
    assert len(set(chosen)) == count
    assert list(chosen) == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < layers
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], chosen[0] + layers], strict=True)]
    assert max(gaps) - min(gaps) <= 1


@given(rotations())
def test_segments_are_what_the_layers_need(rotation: Rotation) -> None:
    assert rotation.segments == rotation.layers - len(rotation.rotating) + rotation.slots == len(set(rotation.homes))
    assert rotation.won == rotation.layers - rotation.segments
    assert len(rotation.homes) == rotation.layers


@given(rotations())
def test_every_layer_has_one_home_which_is_its_lowest_sharer(rotation: Rotation) -> None:
    sharers: dict[int, list[int]] = {}
    for layer, home in enumerate(rotation.homes):
        sharers.setdefault(home, []).append(layer)
    for home, layers in sharers.items():
        assert layers[0] == home
        assert len(layers) == 1 or set(layers) <= set(rotation.rotating)
        assert len(layers) > 1 or home not in rotation.rotating
    assert sum(len(layers) > 1 for layers in sharers.values()) == rotation.slots


@given(rotations())
def test_successive_rotating_layers_share_a_slot_only_where_the_circle_closes(rotation: Rotation) -> None:
    homes = [rotation.homes[layer] for layer in rotation.rotating]
    if rotation.slots > 1:
        assert all(here != there for here, there in itertools.pairwise(homes))
        assert (homes[-1] == homes[0]) == (len(homes) % rotation.slots == 1)


@given(st.data(), st.integers(1, 100))
def test_any_number_of_segments_can_be_held(data: st.DataObject, layers: int) -> None:
    segments = data.draw(st.integers(1, layers))
    rotation = Rotation.holding(layers, segments)
    assert (rotation.layers, rotation.segments) == (layers, segments)
    assert rotation.slots == 0 if segments == layers else rotation.slots in (1, 2)


def test_forty_layers_change_to_double_buffering_where_it_leaves_longer_to_hide() -> None:
    slots = [Rotation.holding(40, 40 - won).slots for won in range(8)]
    assert slots == [0, 1, 1, 1, 1, 2, 2, 2]
    assert Rotation.holding(40, 36).rotating == (4, 12, 20, 28, 36)
    assert Rotation.holding(40, 1).slots == 1


@pytest.mark.parametrize(
    ("layers", "won", "slots"), [(8, 0, 1), (8, 8, 1), (8, 7, 2), (8, 1, 2), (8, 3, 0), (0, 1, 1), (8, -1, 1)]
)
def test_what_cannot_be_is_refused(layers: int, won: int, slots: int) -> None:
    with pytest.raises(ConfigError):
        Rotation.winning(layers, won, slots=slots)


@pytest.mark.parametrize("segments", [-1, 0, 9])
def test_holding_no_segment_or_too_many_is_refused(segments: int) -> None:
    with pytest.raises(ConfigError, match="hold 1 to 8"):
        Rotation.holding(8, segments)


@pytest.mark.parametrize("rotating", [(3, 1), (1, 1), (-1, 2), (2, 8)])
def test_layers_that_are_not_there_or_out_of_order_are_refused(rotating: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="cannot rotate"):
        Rotation(layers=8, rotating=rotating, slots=1)
