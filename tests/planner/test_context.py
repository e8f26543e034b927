"""Capacities are the paper's, a split exceeds none and streams no more than it must, and copies delay a step as they should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.errors import BudgetError, ConfigError
from polder.planner.context_cost import LayerWork, Stream, streamed_seconds
from polder.planner.context_plan import Capacity, Setup, Source
from polder.planner.devices import DEVICES, PCIE5, Link
from polder.planner.model_shape import KNOWN

PAPER = Capacity(layers=10, window_layers=1, local_layer_blocks=100, external_blocks=9 + 8)
LLAMA, H200 = KNOWN["Llama-3.1-8B"], DEVICES["H200"]


@st.composite
def capacities(draw: st.DrawFn) -> Capacity:
    layers = draw(st.integers(1, 80))
    return Capacity(
        layers=layers,
        window_layers=draw(st.integers(1, layers)),
        local_layer_blocks=draw(st.integers(0, 20_000)),
        external_blocks=draw(st.integers(0, 20_000)),
    )


def test_the_papers_example() -> None:
    """L = 10, K_master = 100, K_1 = 9, K_2 = 8: 17 windowed and 8 regular blocks, 25 against 10."""
    assert (PAPER.blocks, PAPER.windowed(25)) == (25, 17)
    assert PAPER._replace(external_blocks=0).blocks == 10
    assert PAPER._replace(window_layers=2).blocks == 17 + 6, "two layers local hold less than one"


@given(capacities(), st.integers(1, 5000))
def test_a_context_exceeds_no_capacity_and_streams_no_more_than_it_must(capacity: Capacity, blocks: int) -> None:
    def local(windowed: int) -> int:
        return windowed * capacity.window_layers + (blocks - windowed) * capacity.layers

    def fits(windowed: int) -> bool:
        return windowed <= capacity.external_blocks and local(windowed) <= capacity.local_layer_blocks

    most = min(blocks, capacity.external_blocks)
    assert fits(most) is (blocks <= capacity.blocks)
    if blocks > capacity.blocks:
        return
    found = capacity.windowed(blocks)
    assert 0 <= found <= blocks
    assert fits(found)
    assert not found or not fits(found - 1)


@given(capacities(), st.integers(1, 5000))
def test_more_memory_never_makes_contexts_shorter_or_windows_larger(capacity: Capacity, more: int) -> None:
    local = capacity._replace(local_layer_blocks=capacity.local_layer_blocks + more)
    external = capacity._replace(external_blocks=capacity.external_blocks + more)
    longest = capacity.blocks
    assert longest <= min(local.blocks, external.blocks)
    assert local.windowed(longest) <= capacity.windowed(longest) == external.windowed(longest)


# ---------------------------------------------------------------- the order of copies

times = st.floats(1e-6, 1.0)


def layer(before: float, attention: float, after: float, load: float, store: float = 0.0) -> LayerWork:
    """On a link of one byte a second."""
    return LayerWork(before_s=before, attention_s=attention, after_s=after, load_bytes=load, store_bytes=store)


@given(
    st.lists(st.builds(layer, times, times, times, times, times), min_size=1, max_size=20),
    st.integers(1, 20),
)
def test_a_step_is_between_its_longer_part_and_the_sum_of_both(layers: list[LayerWork], window: int) -> None:
    step = streamed_seconds(layers, Stream(link_bytes_per_s=1.0, window_layers=window))
    compute = sum(work.compute_s for work in layers)
    link = sum(work.load_bytes + work.store_bytes for work in layers)
    assert max(compute, link) <= step * (1 + 1e-9)
    assert step <= (compute + link) * (1 + 1e-9)


@given(times, times, times, times, st.integers(1, 20), st.integers(2, 20))
def test_from_two_slots_on_a_step_is_the_longer_of_computing_and_copying_and_a_start(
    before: float, attention: float, after: float, load: float, count: int, window: int
) -> None:
    step = streamed_seconds(
        [layer(before, attention, after, load)] * count, Stream(link_bytes_per_s=1.0, window_layers=window)
    )
    longer = max(before + attention + after, load)
    assert step == pytest.approx(max(before, load) + (count - 1) * longer + attention + after)


@given(times, times, times, times, st.integers(1, 20))
def test_with_one_slot_a_load_hides_under_everything_but_attention(
    before: float, attention: float, after: float, load: float, count: int
) -> None:
    step = streamed_seconds(
        [layer(before, attention, after, load)] * count, Stream(link_bytes_per_s=1.0, window_layers=1)
    )
    gap = max(after + before, load)
    assert step == pytest.approx(max(before, load) + (count - 1) * (attention + gap) + attention + after)


def test_a_slot_is_not_written_before_what_it_holds_is_on_its_way_home() -> None:
    """The first chunk of a prompt loads nothing, but each layer's new KV must leave the slot before another's comes in."""
    layers = [layer(0, 1, 0, 0, store=5)] * 2
    assert streamed_seconds(layers, Stream(link_bytes_per_s=1.0, window_layers=1)) == 1 + 5 + 1 + 5
    assert streamed_seconds(layers, Stream(link_bytes_per_s=1.0, window_layers=2)) == 1 + 5 + 5


@given(st.lists(st.builds(layer, times, times, times, times), min_size=1, max_size=20), st.integers(1, 19))
def test_another_slot_never_makes_a_step_longer(layers: list[LayerWork], window: int) -> None:
    narrow, wide = (
        streamed_seconds(layers, Stream(link_bytes_per_s=1.0, window_layers=w)) for w in (window, window + 1)
    )
    assert wide <= narrow * (1 + 1e-9)


def test_what_a_layer_added_is_on_its_way_home_before_its_slot_is_filled_again() -> None:
    layers = [layer(0, 1, 0, 0, store=5), layer(0, 1, 0, 2)]
    assert streamed_seconds(layers, Stream(link_bytes_per_s=1.0, window_layers=1)) == 1 + 5 + 2 + 1
    assert streamed_seconds(layers, Stream(link_bytes_per_s=1.0, window_layers=2)) == 2 + 5


# ---------------------------------------------------------------- times

SETUP = Setup(shape=LLAMA, device=H200, window_layers=2, chunk_tokens=8192)
STOCK = Source()
HOST = Source(name="host", size_bytes=256 << 30, link=PCIE5)


def all_windowed(link_bytes_per_s: float, chunk_tokens: int = 8192) -> tuple[Setup, Source]:
    """A device with room for the window alone, so that a context of 131,072 tokens is windowed as a whole."""
    windowed = 131072 * LLAMA.kv_bytes_of_layer * 2
    used = LLAMA.weight_bytes + chunk_tokens * LLAMA.activation_bytes_per_token
    small = replace(H200, memory_bytes=math.ceil((used + windowed) / 0.92) + 4096)
    link = Link(name="link", bytes_per_s=link_bytes_per_s, source="test")
    setup = Setup(shape=LLAMA, device=small, window_layers=2, chunk_tokens=chunk_tokens)
    return setup, Source(name="all", size_bytes=256 << 30, link=link)


@pytest.mark.parametrize(("link", "expected_ms"), [(55e9, 312), (380e9, 45)])
def test_decoding_128k_tokens_of_an_8b_model(link: float, expected_ms: float) -> None:
    """17.18 GB of KV over 55 and over 380 GB/s; resident, with 15 GB of weights, over 4.3 TB/s."""
    setup, source = all_windowed(link)
    assert setup.outlook(source, 131072).windowed_part == 1
    found = setup.decode(source, 131072)
    assert 1000 * found.seconds == pytest.approx(expected_ms, rel=0.03)
    assert found.compute_s == pytest.approx(7.5e-3, rel=0.01)
    assert SETUP.decode(STOCK, 131072).seconds == found.compute_s


@pytest.mark.parametrize(("chunk", "hidden"), [(4096, True), (512, False)])
def test_chunks_above_2273_tokens_hide_the_stream_by_pcie(chunk: int, hidden: bool) -> None:
    setup, source = all_windowed(55e9, chunk)
    found = setup.prefill(source, 131072)
    assert found.hidden_part is not None
    assert (found.hidden_part > 0.95) is hidden


def test_the_hidden_part_is_a_part() -> None:
    setup, source = all_windowed(380e9)
    assert 0 <= (setup.decode(source, 131072).hidden_part or 0) <= 1
    assert setup.decode(STOCK, 16).hidden_part is None


def test_prefill_is_quadratic_in_the_end() -> None:
    short, long = (SETUP.prefill(Source(), n).seconds for n in (1 << 19, 1 << 20))
    assert 3.6 < long / short < 4


# ---------------------------------------------------------------- plans


def test_short_contexts_cost_the_same_with_a_window_and_without() -> None:
    stock, host = (SETUP.outlook(source, 65536) for source in (STOCK, HOST))
    assert (host.ttft_s, host.tbt_s) == (stock.ttft_s, stock.tbt_s)
    assert host.windowed_part == 0
    assert host.at_once > stock.at_once


def test_beyond_stocks_longest_a_window_streams() -> None:
    longest = SETUP.longest_tokens(STOCK)
    assert not SETUP.outlook(STOCK, longest + 16).fits
    found = SETUP.outlook(HOST, longest + 16)
    assert found.windowed_part is not None
    assert 0 < found.windowed_part < 1e-4
    assert SETUP.longest_tokens(HOST) > 2 * longest


def test_the_longest_within_a_goal_keeps_it_and_a_block_more_does_not() -> None:
    goal_s = 0.1
    tokens = SETUP.longest_within(HOST, goal_s)
    assert SETUP.decode(HOST, tokens).seconds <= goal_s < SETUP.decode(HOST, tokens + 16).seconds
    assert SETUP.longest_within(HOST, 1e-6) == 0
    assert SETUP.longest_within(HOST, 1e6) == SETUP.longest_tokens(HOST)


def test_contexts_double_up_to_the_longest_that_memory_and_the_model_allow() -> None:
    for shape in (LLAMA, replace(LLAMA, trained_tokens=None)):
        setup = replace(SETUP, shape=shape)
        longest = min(setup.longest_tokens(STOCK), shape.trained_tokens or 1 << 40)
        shown = [outlook.context_tokens for outlook in setup.outlooks(STOCK, 100)]
        assert shown == [100, *(8192 << n for n in range(10) if 8192 << n < longest), longest]


def test_a_window_has_at_least_a_layer_and_at_most_all() -> None:
    for window in (0, 33):
        with pytest.raises(ConfigError, match="of 32 layers"):
            replace(SETUP, window_layers=window)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"131.4 GiB of weights"):
        _ = replace(SETUP, shape=KNOWN["Llama-3.1-70B"], device=DEVICES["H100"]).local_bytes
