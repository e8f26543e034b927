"""Windowed KV is read and kept as if every layer had memory of its own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.engines.vllm.window import worker as window_worker
from polder.memory import _libc
from tests.conftest import examples
from tests.window.passes import PASSES, SHAPES, Pass, Shape, rank_of
from tests.window.rank import Rank


@examples(60)
@given(shape=SHAPES, passes=st.lists(PASSES, min_size=1, max_size=6))
def test_every_layer_reads_the_truth_and_the_store_keeps_it(shape: Shape, passes: list[Pass]) -> None:
    with rank_of(shape).open() as rank:
        for one in passes:
            one.run(rank)
            if one.settled:
                rank.stream.settle()
                rank.check()
        rank.stream.settle()
        rank.check()
        statistics = rank.stream.statistics()
        assert (statistics.loaded_bytes, statistics.stored_bytes) == (rank.loaded_bytes, rank.stored_bytes)


@pytest.mark.parametrize(("layers", "window_layers"), [(2, 1), (5, 2), (6, 3), (7, 3), (8, 4), (3, 3)])
def test_a_pass_loads_and_stores_each_layer_of_its_windowed_blocks_once(layers: int, window_layers: int) -> None:
    with Rank(layers, window_layers).open() as rank:
        first = rank.first
        for _ in range(3):
            rank.run([first, first + 1, first + 2, 0, first], [first + 2, first + 3, 1])
        rank.stream.settle()
        rank.check()
        statistics = rank.stream.statistics()
        assert statistics.loaded_bytes == 3 * layers * 3 * rank.block_bytes
        assert statistics.stored_bytes == 3 * layers * 2 * rank.block_bytes
        assert statistics.passes == 3


def test_a_pass_without_windowed_blocks_copies_nothing() -> None:
    with Rank(4, 2).open() as rank:
        assert not rank.run([0, 1], [1, 2])
        assert not rank.stream.begin([], [])
        assert rank.window.copies.statistics().submitted == 0
        rank.check()


def test_a_block_that_others_reuse_has_nothing_of_its_former_owner() -> None:
    with Rank(6, 2).open() as rank:
        block = rank.first + 1
        rank.run([], [block])
        rank.run([block], [block])
        rank.run([], [block])
        rank.run([block], [])
        rank.stream.settle()
        rank.check()


def test_what_a_given_up_pass_had_under_way_does_not_reach_the_next_one() -> None:
    with Rank(8, 2).open() as rank:
        first = rank.first
        for until in range(8):
            rank.run([first, first + 1], [first + 1], until=until, half=True)
            rank.run([first + 1, first + 2], [first + 3])
        rank.stream.settle()
        rank.check()


def test_windowed_layers_do_share_their_pages() -> None:
    """The control: what one layer writes, another of the same slot finds, unless somebody asks the stream."""
    with Rank(6, 2).open() as rank:
        block = rank.first
        rank.local(0, block)[:] = 7
        for layer in range(6):
            assert (rank.local(layer, block) == 7).all() == (layer % 2 == 0)


def test_a_closed_donor_has_its_own_pages_again_zeroed() -> None:
    with Rank(6, 3, donors=2).open() as rank:
        rank.run([], rank.windowed[:4])
        rank.stream.settle()
        rank.check()
        mapped = int(rank.span.mapped.sum())
        rank.window.close(list(rank.donors))
        assert int(rank.span.mapped.sum()) == mapped - 4 * 6 + 2 * 6
        blocks = range(len(rank.regular), rank.first)
        assert not any(rank.local(layer, block).any() for layer in range(6) for block in blocks)
        rank.local(0, blocks[0])[:] = 1
        assert not any(rank.local(layer, blocks[0]).any() for layer in range(1, 6))


@pytest.mark.parametrize(("layers", "window_layers"), [(2, 1), (5, 2), (6, 3), (3, 3)])
def test_opened_units_have_nothing_of_what_was_in_their_pages(layers: int, window_layers: int) -> None:
    for order in (range(layers), range(layers)[::-1]):
        with Rank(layers, window_layers, block_bytes=6144, donors=2, order=order).open() as rank:
            assert not any(rank.local(layer, block).any() for layer in range(layers) for block in rank.windowed)


def test_a_moved_block_is_the_same_in_every_layer_wherever_it_was_and_goes() -> None:
    with Rank(5, 2).open() as rank:
        sources, targets = [rank.first, rank.first + 1, 2], [0, rank.first + 3, rank.first + 2]
        rank.run([], [rank.first])
        assert rank.window.settled()
        rank.window.move(np.array(sources), np.array(targets))
        for source, target in zip(sources, targets, strict=True):
            rank.truth[:, target] = rank.truth[:, source]
        rank.check()


def test_loads_run_while_earlier_layers_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_worker, "INLINE_BYTES", 0)
    with Rank(4, 2).open() as rank:
        steps, real = threading.Semaphore(0), _libc.copy_bytes

        def copy(*arguments: int) -> None:
            assert steps.acquire(timeout=30)
            real(*arguments)

        monkeypatch.setattr(_libc, "copy_bytes", copy)
        assert rank.stream.begin([rank.first], [])
        steps.release(1)
        rank.stream.before(0)
        assert (rank.local(0, rank.first) == rank.truth[0, rank.first]).all()
        assert not (rank.local(1, rank.first) == rank.truth[1, rank.first]).all(), "before(0) does not wait for layer 1"
        steps.release(10)
        rank.stream.settle()
        assert (rank.local(1, rank.first) == rank.truth[1, rank.first]).all()
