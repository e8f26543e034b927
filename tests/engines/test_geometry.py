"""Units are disjoint runs of whole pages that cover exactly their blocks' bytes, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.engines.vllm.rank.geometry import KvGeometry, TensorPlace, unit_blocks
from polder.errors import ConfigError

PAGE = 4096


def layer_major(layers: int, block_bytes: int, units: int) -> KvGeometry:
    per_unit = unit_blocks(
        [TensorPlace(offset=0, layers=layers, layer_stride=block_bytes, block_stride=block_bytes)], PAGE
    )
    blocks = per_unit * units
    places = (TensorPlace(offset=0, layers=layers, layer_stride=block_bytes * blocks, block_stride=block_bytes),)
    return KvGeometry(
        page_bytes=PAGE,
        size_bytes=layers * block_bytes * blocks,
        num_blocks=blocks,
        unit_blocks=per_unit,
        places=places,
    )


@given(
    layers=st.integers(1, 6), block_bytes=st.sampled_from([256, 768, 1024, 4096, 6144, 12288]), units=st.integers(1, 5)
)
def test_units_partition_the_buffer(layers: int, block_bytes: int, units: int) -> None:
    geometry = layer_major(layers, block_bytes, units)
    geometry.check()
    slots = geometry.slots(range(geometry.units))
    assert np.array_equal(np.sort(slots), np.arange(geometry.total_slots))
    for unit in range(geometry.units):
        covered = {
            byte // PAGE
            for layer in range(layers)
            for block in range(unit * geometry.unit_blocks, (unit + 1) * geometry.unit_blocks)
            for byte in range(
                layer * geometry.places[0].layer_stride + block * block_bytes,
                layer * geometry.places[0].layer_stride + (block + 1) * block_bytes,
                256,
            )
        }
        assert set(geometry.slots([unit]).tolist()) == covered


def test_a_block_outermost_layout_is_one_run_a_unit() -> None:
    place = TensorPlace(offset=0, layers=4, layer_stride=512, block_stride=2048)
    geometry = KvGeometry(page_bytes=PAGE, size_bytes=2048 * 16, num_blocks=16, unit_blocks=2, places=(place,))
    geometry.check()
    assert geometry.slots([3]).tolist() == [3]
    assert len(geometry.runs()) == 1


def test_overlaid_groups_count_their_pages_once() -> None:
    one = TensorPlace(offset=0, layers=2, layer_stride=2048 * 8, block_stride=2048)
    geometry = KvGeometry(page_bytes=PAGE, size_bytes=2 * 2048 * 8, num_blocks=8, unit_blocks=2, places=(one, one))
    geometry.check()
    assert geometry.pages_per_unit == 2
    assert len(geometry.runs()) == 2


def test_layers_that_start_inside_a_page_are_refused() -> None:
    place = TensorPlace(offset=100, layers=1, layer_stride=1 << 20, block_stride=4096)
    geometry = KvGeometry(page_bytes=PAGE, size_bytes=1 << 20, num_blocks=8, unit_blocks=1, places=(place,))
    with pytest.raises(ConfigError, match="100 bytes into a page"):
        geometry.check()
