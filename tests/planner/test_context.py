"""Capacities are the paper's, a split exceeds none and streams no more than it must, and copies delay a step as they should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.errors import BudgetError, ConfigError
from polder.planner.context import Capacity
from polder.planner.context_cost import LayerWork, Stream, decode_seconds, prefill_seconds, streamed_seconds
from polder.planner.context_plan import Setup, Source, contexts_to_show
from polder.planner.devices import DEVICES, PCIE5
from polder.planner.model_shape import KNOWN
from polder.planner.paper_contexts import compare_with_paper

PAPER = Capacity(block_tokens=1, layers=10, window_layers=1, local_layer_blocks=100, external_blocks=9 + 8)
LLAMA, H200 = KNOWN["Llama-3.1-8B"], DEVICES["H200"]
PCIE, NVLINK = 55e9, 380e9


@st.composite
def capacities(draw: st.DrawFn) -> Capacity:
    layers = draw(st.integers(1, 80))
    return Capacity(
        block_tokens=draw(st.sampled_from([1, 16, 256])),
        layers=layers,
        window_layers=draw(st.integers(1, layers)),
        local_layer_blocks=draw(st.integers(0, 20_000)),
        external_blocks=draw(st.integers(0, 20_000)),
    )


def test_the_papers_example() -> None:
    """L = 10, K_master = 100, K_1 = 9, K_2 = 8: 17 windowed and 8 regular blocks, 25 against 10."""
    assert (PAPER.windowed_blocks, PAPER.regular_blocks, PAPER.longest_tokens) == (17, 8, 25)
    assert replace(PAPER, external_blocks=0).longest_tokens == 10
    assert PAPER.windowed(25) == 17


def test_two_layers_local_hold_less_than_one() -> None:
    two = replace(PAPER, window_layers=2)
    assert (two.windowed_blocks, two.regular_blocks) == (17, 6)


def test_a_block_of_qwen3_32b_has_the_papers_size() -> None:
    """256 tokens, 64 layers: 64 MiB; of 1 GiB lent 16 blocks."""
    shape = KNOWN["Qwen3-32B"]
    found = Capacity.of_bytes(shape, local_bytes=1 << 30, external_bytes=(1 << 30) + 5, block_tokens=256)
    assert (found.external_blocks, found.local_layer_blocks) == (16, 1024)
    nothing = Capacity.of_bytes(shape, local_bytes=-1, external_bytes=-1, block_tokens=256)
    assert nothing.external_blocks == nothing.local_layer_blocks == 0


@pytest.mark.parametrize("window", [0, 11])
def test_a_window_has_at_least_a_layer_and_at_most_all(window: int) -> None:
    with pytest.raises(ConfigError, match="of 10 layers"):
        replace(PAPER, window_layers=window)


@given(capacities(), st.integers(1, 100_000), st.integers(1, 5))
def test_a_context_exceeds_no_capacity_and_streams_no_more_than_it_must(
    capacity: Capacity, context: int, sequences: int
) -> None:
    blocks = sequences * math.ceil(context / capacity.block_tokens)
    if blocks * capacity.block_tokens > capacity.longest_tokens:
        with pytest.raises(BudgetError, match=f"{capacity.longest_tokens:,} tokens"):
            capacity.windowed(context, sequences)
        return
    found = capacity.windowed(context, sequences)

    def local(windowed: int) -> int:
        return windowed * capacity.window_layers + (blocks - windowed) * capacity.layers

    assert 0 <= found <= min(blocks, capacity.external_blocks)
    assert local(found) <= capacity.local_layer_blocks
    if found:
        assert local(found - 1) > capacity.local_layer_blocks


@given(capacities(), st.integers(1, 5000))
def test_more_memory_never_makes_contexts_shorter_or_windows_larger(capacity: Capacity, more: int) -> None:
    local = replace(capacity, local_layer_blocks=capacity.local_layer_blocks + more)
    external = replace(capacity, external_blocks=capacity.external_blocks + more)
    longest = capacity.longest_tokens
    assert longest <= min(local.longest_tokens, external.longest_tokens)
    if longest:
        assert local.windowed(longest) <= capacity.windowed(longest) == external.windowed(longest)


@given(capacities(), st.integers(1, 10_000))
def test_as_many_contexts_fit_at_once_as_have_room(capacity: Capacity, context: int) -> None:
    count = capacity.at_once(context)
    if count:
        capacity.windowed(context, count)
    with pytest.raises(BudgetError):
        capacity.windowed(context, count + 1)


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


@pytest.mark.parametrize(("link", "expected_ms"), [(math.inf, 7.5), (PCIE, 312), (NVLINK, 45)])
def test_decoding_128k_tokens_of_an_8b_model(link: float, expected_ms: float) -> None:
    """17.18 GB of KV over 55 and over 380 GB/s; resident, with 15 GB of weights, over 4.3 TB/s."""
    windowed = 0 if link == math.inf else 131072
    found = decode_seconds(LLAMA, H200, 131072, 1, windowed, Stream(link_bytes_per_s=link, window_layers=2))
    assert 1000 * found.seconds == pytest.approx(expected_ms, rel=0.03)
    assert found.compute_s == pytest.approx(7.5e-3, rel=0.01)


@pytest.mark.parametrize(("chunk", "hidden"), [(4096, True), (512, False)])
def test_chunks_above_2273_tokens_hide_the_stream_by_pcie(chunk: int, hidden: bool) -> None:
    found = prefill_seconds(LLAMA, H200, 131072, chunk, 131072, Stream(link_bytes_per_s=PCIE, window_layers=2))
    assert found.hidden_part is not None
    assert (found.hidden_part > 0.95) is hidden


def test_the_hidden_part_is_a_part() -> None:
    stream = Stream(link_bytes_per_s=NVLINK, window_layers=1)
    assert decode_seconds(LLAMA, H200, 1 << 20, 1, 1 << 20, stream).hidden_part == 0


def test_nothing_streamed_costs_nothing() -> None:
    found = prefill_seconds(LLAMA, H200, 10_000, 8192, 0, Stream())
    assert found.seconds == pytest.approx(found.compute_s)
    assert found.hidden_part is None
    assert found.link_s == 0


def test_prefill_is_quadratic_in_the_end() -> None:
    short, long = (prefill_seconds(LLAMA, H200, n, 8192, 0, Stream()).seconds for n in (1 << 20, 1 << 21))
    assert 3.8 < long / short < 4


# ---------------------------------------------------------------- plans

SETUP = Setup(shape=LLAMA, device=H200, window_layers=2, chunk_tokens=8192)
STOCK = Source()
HOST = Source(name="host", size_bytes=256 << 30, link=PCIE5)


def test_short_contexts_cost_the_same_with_a_window_and_without() -> None:
    stock, host = (SETUP.outlook(source, 65536) for source in (STOCK, HOST))
    assert (host.ttft_s, host.tbt_s) == (stock.ttft_s, stock.tbt_s)
    assert host.windowed_part == 0
    assert host.at_once > stock.at_once


def test_beyond_stocks_longest_a_window_streams() -> None:
    longest = SETUP.capacity(STOCK).longest_tokens
    assert not SETUP.outlook(STOCK, longest + 16).fits
    found = SETUP.outlook(HOST, longest + 16)
    assert found.windowed_part is not None
    assert 0 < found.windowed_part < 1e-4
    assert SETUP.capacity(HOST).longest_tokens > 2 * longest


def test_the_longest_within_a_goal_keeps_it_and_a_block_more_does_not() -> None:
    goal_s = 0.1
    tokens = SETUP.longest_within(HOST, goal_s)
    within, beyond = (SETUP.outlook(HOST, n).tbt_s for n in (tokens, tokens + 16))
    assert within is not None
    assert beyond is not None
    assert within <= goal_s < beyond
    assert SETUP.longest_within(HOST, 1e-6) == 0
    assert SETUP.longest_within(HOST, 1e6) == SETUP.capacity(HOST).longest_tokens


def test_contexts_double_up_to_the_longest() -> None:
    assert contexts_to_show(40_000, 100) == [100, 8192, 16384, 32768, 40_000]
    assert contexts_to_show(0, None) == []


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"131.4 GiB of weights"):
        _ = replace(SETUP, shape=KNOWN["Llama-3.1-70B"], device=DEVICES["H100"]).local_bytes


def test_the_papers_table_is_ordered_as_ours() -> None:
    """Chunks of 8K are the best baseline, and where nearly all is lent (24 GB cards) the ratios agree within a third."""
    compared = list(compare_with_paper())
    assert len(compared) == 8
    for row in compared:
        assert min(row.ours) == row.ours.chunk_8k
        assert min(row.paper) == row.paper.chunk_8k
        assert 0 < row.implied_lent_bytes < 1.1 * row.lent_bytes
    small = [row for row in compared if row.memory_gib == 24]
    assert all(0.66 < ours / paper < 1.34 for row in small for ours, paper in zip(row.ours, row.paper, strict=True))
