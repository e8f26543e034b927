"""Sizes that broker, core and workers agree on, before any KV cache exists."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from polder.engines.vllm.rank.geometry import KvGeometry
from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.start.sizes import Sizes, hello_of
from polder.engines.vllm.window.agreement import WindowAgreement, agree_on_window, units_with_window
from polder.errors import BudgetError, ConfigError

PAGE = 4096
BLOCK_BYTES = 1024
UNIT_BLOCKS = PAGE // BLOCK_BYTES
TOKENS = 16


def settings(window_bytes: int = 1 << 30, window_layers: int = 2) -> EngineSettings:
    return EngineSettings(
        engine="e",
        broker=Path("/run/b.sock"),
        kv_budget_bytes=None,
        page_bytes=PAGE,
        kv_floor_bytes=None,
        kv_share_bytes=None,
        kv_ceiling_bytes=None,
        window_bytes=window_bytes,
        window_layers=window_layers,
    )


def tensor(names: list[str], blocks: int, *, offset: int = 0, size: int = 0) -> SimpleNamespace:
    stride = blocks * BLOCK_BYTES
    return SimpleNamespace(
        size=size or len(names) * stride, layers=names, layer_stride=stride, block_stride=BLOCK_BYTES, offset=offset
    )


def names(*numbers: int) -> list[str]:
    return [f"model.layers.{n}.self_attn.attn" for n in numbers]


SIZES: dict[str, Any] = {"block_size": TOKENS, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)


def config(tensors: list[SimpleNamespace], blocks: int, groups: int = 1, spec: KVCacheSpec = FULL) -> SimpleNamespace:
    group = SimpleNamespace(kv_cache_spec=spec)
    return SimpleNamespace(kv_cache_tensors=tensors, kv_cache_groups=[group] * groups, num_blocks=blocks)


def model(layers: int, units: int) -> SimpleNamespace:
    return config([tensor(names(*range(layers)), units * UNIT_BLOCKS)], units * UNIT_BLOCKS)


def agreed(layers: int, window_layers: int, regular: int, store_units: int) -> WindowAgreement:
    kv = model(layers, regular + store_units)
    found = agree_on_window(
        settings(window_layers=window_layers), kv, KvGeometry.of(kv, PAGE, UNIT_BLOCKS), regular_units=regular
    )
    assert found is not None
    return found


def hello(agreement: WindowAgreement, max_model_len: int, own: EngineSettings | None = None) -> Any:
    """The floor and ceiling that the broker is told."""
    units = agreement.regular_units + agreement.shape.store_units
    kv = model(agreement.shape.layers, units)
    name = SimpleNamespace(max_model_len=max_model_len, served_model_name="m", model="m")
    sizes = Sizes(
        configs=[kv],
        geometry=KvGeometry.of(kv, PAGE, UNIT_BLOCKS),
        regular_units=agreement.regular_units,
        window=agreement,
    )
    return hello_of(SimpleNamespace(model_config=name), own or settings(), sizes, ["cpu:0"])


def test_a_floor_that_cannot_hold_one_request_is_refused_with_what_to_give() -> None:
    own = replace(settings(), kv_floor_bytes=2 * 4 * PAGE)
    with pytest.raises(BudgetError, match=r"give at least .*, or lower --max-model-len"):
        hello(agreed(4, 2, regular=8, store_units=4), 400, own)


SHAPES = st.integers(2, 12).flatmap(
    lambda layers: st.tuples(st.just(layers), st.integers(1, layers // 2), st.integers(2, 9))
)


@given(shape=SHAPES, store_bytes=st.integers(0, 1 << 22), rest=st.integers(0, PAGE - 1))
def test_windowed_units_fit_the_store_and_the_donors(shape: tuple[int, int, int], store_bytes: int, rest: int) -> None:
    layers, window_layers, units = shape
    unit_bytes = layers * PAGE
    ceiling, wanted = units * unit_bytes + rest, settings(window_layers=window_layers)
    assume(store_bytes >= unit_bytes)
    regular, everything = units_with_window(
        model(layers, 3), wanted, ceiling_bytes=ceiling, store_bytes=store_bytes, blocks_of_unit=UNIT_BLOCKS
    )
    windowed = everything - regular
    assert regular == units
    assert windowed * unit_bytes <= store_bytes
    assert windowed <= (regular - 1) * (layers // window_layers), "more could never have pages"
    assert windowed in (store_bytes // unit_bytes, (regular - 1) * (layers // window_layers))


@given(shape=SHAPES, store_units=st.integers(1, 40))
def test_the_agreement_has_the_units_of_geometry_and_store(shape: tuple[int, int, int], store_units: int) -> None:
    layers, window_layers, regular = shape
    agreement = agreed(layers, window_layers, regular, store_units)
    assert agreement.shape.store_units == store_units
    assert (agreement.unit_bytes, agreement.unit_blocks) == (layers * PAGE, UNIT_BLOCKS)
    assert (agreement.block_bytes, agreement.block_tokens) == (BLOCK_BYTES, TOKENS)
    host = [range(100, 150 + agreement.store_pages), range(agreement.store_pages)]
    plan = agreement.plan(host)
    assert plan.first_block == regular * UNIT_BLOCKS
    assert plan.blocks * layers * plan.block_bytes == agreement.store_pages * PAGE
    assert plan.host_pages == (tuple(range(150, 150 + agreement.store_pages)), tuple(range(agreement.store_pages)))
    assert plan.layers == agreement.layers


def test_without_a_store_there_is_no_window() -> None:
    kv = model(4, 8)
    assert agree_on_window(settings(window_bytes=0), kv, KvGeometry.of(kv, PAGE, UNIT_BLOCKS), 8) is None


def test_layers_are_in_the_order_of_their_numbers_wherever_they_lie() -> None:
    blocks, numbers = 8, [0, 1, 10, 11, 2, 3]
    stride = blocks * BLOCK_BYTES
    tensors = [
        tensor(names(*numbers[:4]), blocks, size=6 * stride),
        tensor(names(*numbers[4:]), blocks, offset=4 * stride, size=6 * stride),
    ]
    kv = config(tensors, blocks)
    agreement = agree_on_window(settings(), kv, KvGeometry.of(kv, PAGE, UNIT_BLOCKS), 1)
    assert agreement is not None
    assert agreement.layers == tuple(
        (name, numbers.index(n) * stride) for n, name in zip(sorted(numbers), names(*sorted(numbers)), strict=True)
    )


def in_a_mebibyte(kv: SimpleNamespace, wanted: EngineSettings) -> None:
    units_with_window(kv, wanted, ceiling_bytes=1 << 20, store_bytes=1 << 20, blocks_of_unit=UNIT_BLOCKS)


def test_a_layer_without_a_number_is_refused() -> None:
    kv = config([tensor(["model.attn", *names(1, 2, 3)], 8)], 8)
    with pytest.raises(ConfigError, match=r"model\.attn"):
        in_a_mebibyte(kv, settings())


def refuse(kv: SimpleNamespace, match: str, window_layers: int = 2) -> None:
    wanted = settings(window_layers=window_layers)
    with pytest.raises(ConfigError, match=match):
        in_a_mebibyte(kv, wanted)
    with pytest.raises(ConfigError, match=match):
        agree_on_window(wanted, kv, KvGeometry.of(kv, PAGE, UNIT_BLOCKS), 2)


def test_a_layout_with_the_blocks_outermost_is_refused() -> None:
    place = tensor(names(0, 1, 2, 3), 8)
    place.layer_stride, place.block_stride = BLOCK_BYTES, 4 * BLOCK_BYTES
    refuse(config([place], 8), "layers outermost")


@pytest.mark.parametrize("kind", ["two groups", "overlaid", "two sizes"])
def test_a_hybrid_model_is_refused(kind: str) -> None:
    first = tensor(names(0, 1, 2, 3), 8)
    second = tensor(names(4, 5, 6, 7), 8, offset=0 if kind == "overlaid" else first.size)
    if kind == "two sizes":
        second.block_stride *= 2
        second.layer_stride *= 2
    refuse(config([first, second], 8, groups=2 if kind == "two groups" else 1), "one kind of attention")


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(**SIZES, sliding_window=64),
        FullAttentionSpec(**SIZES, sliding_window=64),
        FullAttentionSpec(**SIZES, attention_chunk_size=64),
        ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=64),
        RSWASpec(**SIZES, rswa_window=64),
        MLAAttentionSpec(**SIZES),
    ],
    ids=["sliding", "full, computed as sliding", "full, computed in chunks", "chunked", "R-SWA", "MLA"],
)
def test_a_model_whose_only_kind_of_attention_is_not_full_is_refused(spec: KVCacheSpec) -> None:
    refuse(config([tensor(names(0, 1, 2, 3), 8)], 8, spec=spec), "full attention only")


@pytest.mark.parametrize(("layers", "window_layers"), [(4, 3), (4, 4), (4, 5), (5, 3), (3, 2), (1, 1)])
def test_more_than_half_of_the_layers_make_no_room(layers: int, window_layers: int) -> None:
    refuse(model(layers, 8), f"POLDER_WINDOW_LAYERS={window_layers} of {layers} ", window_layers)


@pytest.mark.parametrize(("ceiling_units", "store_units"), [(8, 0), (1, 8), (0, 8)])
def test_a_store_or_a_budget_without_a_unit_is_refused(ceiling_units: int, store_units: int) -> None:
    unit = 4 * PAGE
    with pytest.raises(BudgetError, match="POLDER_WINDOW=1 GiB is less than one unit of 16 KiB"):
        units_with_window(
            model(4, 8),
            settings(),
            ceiling_bytes=ceiling_units * unit + 5,
            store_bytes=store_units * unit + unit - 1,
            blocks_of_unit=UNIT_BLOCKS,
        )


@given(shape=SHAPES, store_units=st.integers(1, 40))
def test_the_longest_context_that_a_refusal_names_is_possible_and_the_longest(
    shape: tuple[int, int, int], store_units: int
) -> None:
    layers, window_layers, regular = shape
    agreement = agreed(layers, window_layers, regular, store_units)
    with pytest.raises(BudgetError) as refused:
        hello(agreement, 1 << 30)
    named = re.search(r"hold (\d+) tokens", str(refused.value))
    assert named is not None
    tokens = int(named[1])
    found = hello(agreement, tokens)
    assert agreement.shape.most(found.floor_units) * UNIT_BLOCKS >= tokens // TOKENS + 1
    assert found.floor_units <= found.ceiling_units == regular
    assert found.host_pages == agreement.store_pages
    with pytest.raises(BudgetError, match=f"max_model_len {tokens + 1} has no room"):
        hello(agreement, tokens + 1)


@given(shape=SHAPES, store_units=st.integers(1, 40), tokens=st.integers(1, 3000))
def test_the_floor_is_what_the_longest_request_needs_and_not_more(
    shape: tuple[int, int, int], store_units: int, tokens: int
) -> None:
    layers, window_layers, regular = shape
    agreement = agreed(layers, window_layers, regular, store_units)
    blocks = -(-tokens // TOKENS) + 1  # the null block
    assume(agreement.shape.most(regular) * UNIT_BLOCKS >= blocks)
    floor = hello(agreement, tokens).floor_units
    assert agreement.shape.most(floor) * UNIT_BLOCKS >= blocks
    assert floor == 1 or agreement.shape.most(floor - 1) * UNIT_BLOCKS < blocks
