"""Layouts: what overlapped overlaps afterwards, what is shared stays, and nothing else overlaps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.errors import UsageError
from polder.weights.layout import Extent, lay_out

PAGE = 4096


def extent(name: str, address: int, size: int, obstacle: str = "") -> Extent:
    return Extent(name=name, address=address, size_bytes=size, obstacle=obstacle)


def test_tensors_follow_one_another_as_named_at_cache_lines() -> None:
    layout = lay_out([[extent("b", 64_000, 100), extent("a", 640, 5000)]], page_bytes=PAGE, alignment=64)
    assert layout.offsets == ({"b": 0, "a": 128},)
    assert (layout.used_bytes, layout.layer_pages) == ((5128,), 2)
    assert not layout.resident


def test_all_layers_have_pages_for_the_largest() -> None:
    layout = lay_out([[extent("w", 0, 10)], [extent("w", 6400, 3 * PAGE)], []], page_bytes=PAGE, alignment=64)
    assert (layout.layer_pages, layout.used_bytes) == (3, (10, 3 * PAGE, 0))


def test_ties_and_views_within_a_layer_stay_what_they_are() -> None:
    layer = [extent("w", 6400, 512), extent("tied", 6400, 512), extent("head", 6400, 64), extent("tail", 6900, 64)]
    layout = lay_out([layer], page_bytes=PAGE, alignment=64)
    assert layout.offsets == ({"w": 0, "tied": 0, "head": 0, "tail": 500},)
    assert layout.used_bytes == (564,)
    assert len(layout.blocks[0]) == 1


def test_slices_of_one_storage_move_apart() -> None:
    layout = lay_out([[extent("w", 6400, 640)], [extent("w", 7040, 640)]], page_bytes=PAGE, alignment=64)
    assert layout.offsets == ({"w": 0}, {"w": 0})
    assert not layout.resident


def test_an_address_keeps_what_it_is_beyond_a_cache_line() -> None:
    layout = lay_out([[extent("a", 6408, 8), extent("b", 6500, 8)]], page_bytes=PAGE, alignment=64)
    assert layout.offsets == ({"a": 8, "b": 64 + 36},)


def test_what_is_shared_or_has_an_obstacle_stays_and_is_counted() -> None:
    layers = [
        [extent("w", 6400, 64), extent("tied", 9600, 128), extent("e", 0, 0), extent("meta", 0, 0, "meta")],
        [extent("w", 12800, 64), extent("tied", 9664, 128), extent("far", 32000, 50, "on cpu")],
        [extent("w", 19200, 64), extent("lm", 25600, 100)],
    ]
    layout = lay_out(
        layers, page_bytes=PAGE, alignment=64, outside=[extent("lm_head", 25650, 10), extent("norm", 1 << 20, 10)]
    )
    assert layout.offsets == ({"w": 0}, {"w": 0}, {"w": 0})
    assert layout.resident == {
        "0.tied": "shared by 0.tied, 1.tied",
        "1.tied": "shared by 0.tied, 1.tied",
        "0.e": "empty",
        "0.meta": "meta",
        "1.far": "on cpu",
        "2.lm": "shared by 2.lm, lm_head",
    }
    assert layout.resident_bytes == 192 + 50 + 100


def test_layers_of_which_nothing_can_move_are_refused() -> None:
    with pytest.raises(UsageError, match="no tensor of these 2 layers can move"):
        lay_out([[extent("w", 0, 0)], []], page_bytes=PAGE, alignment=64)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 300)), max_size=5), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 300)), max_size=2),
)
def test_every_byte_moves_once_and_keeps_its_distance_to_its_neighbours(
    layers: list[list[tuple[int, int]]], outside: list[tuple[int, int]]
) -> None:
    named = [[extent(f"t{i}", *place) for i, place in enumerate(layer)] for layer in layers]
    try:
        layout = lay_out(
            named, page_bytes=PAGE, alignment=64, outside=[extent(f"o{i}", *p) for i, p in enumerate(outside)]
        )
    except UsageError:
        return
    owners: dict[int, set[int]] = {}
    for layer, extents in [*enumerate(named), (-1, [extent("o", *place) for place in outside])]:
        for e in extents:
            for byte in range(e.address, e.address + e.size_bytes):
                owners.setdefault(byte, set()).add(layer)
    for layer, extents in enumerate(named):
        at: dict[int, int] = {}  # old byte -> new byte
        for e in extents:
            if e.name not in layout.offsets[layer]:
                assert f"{layer}.{e.name}" in layout.resident
                continue
            assert (layout.offsets[layer][e.name] - e.address) % 64 == 0
            for i in range(e.size_bytes):
                assert owners[e.address + i] == {layer}
                assert (
                    at.setdefault(e.address + i, layout.offsets[layer][e.name] + i) == layout.offsets[layer][e.name] + i
                )
        assert len(set(at.values())) == len(at)
        assert max(at.values(), default=-1) < layout.used_bytes[layer] or not at
        assert layout.used_bytes[layer] <= layout.layer_pages * PAGE
