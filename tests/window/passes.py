"""Random ranks and passes for hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

from tests.window.rank import Rank

__all__ = ["PASSES", "SHAPES", "Pass", "Shape", "rank_of"]


class Pass(NamedTuple):
    """Blocks are numbered from 0 in their region; regular ones have negative numbers."""

    read: list[int]
    written: list[int]
    given_up: float
    half: bool
    settled: bool

    def run(self, rank: Rank) -> bool:
        read, written = (
            [rank.windowed[b % len(rank.windowed)] if b >= 0 else rank.regular[b] for b in blocks]
            for blocks in (self.read, self.written)
        )
        until = int(self.given_up * rank.layers)
        return rank.run(read, written, until=until, half=self.half and until < rank.layers)


SOME = st.lists(st.integers(-2, 6), max_size=6)
REGULAR = st.lists(st.integers(-2, -1), max_size=2)
PASSES = st.builds(
    Pass,
    SOME | REGULAR,
    SOME | REGULAR,
    st.just(1.0) | st.floats(0.0, 1.0),
    st.booleans(),
    st.booleans(),
)
Shape = tuple[int, int, int, int, Sequence[int]]
SHAPES: st.SearchStrategy[Shape] = st.integers(2, 8).flatmap(
    lambda layers: st.tuples(
        st.just(layers),
        st.integers(1, min(4, layers)),
        st.sampled_from([1024, 2048, 6144]),
        st.integers(1, 2),
        st.just(range(layers)) | st.permutations(range(layers)),
    )
)


def rank_of(shape: Shape) -> Rank:
    layers, window_layers, block_bytes, donors, order = shape
    return Rank(layers, window_layers, block_bytes=block_bytes, donors=donors, order=order)
