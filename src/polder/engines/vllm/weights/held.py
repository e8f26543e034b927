"""Which segments the ranks of an engine hold, as its core knows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polder.broker.wire import Pages

__all__ = ["HeldSegments", "Segments"]

Segments = list[list[list[int]]]
"""For each segment, its pages on each rank."""


class HeldSegments:
    """All ranks hold as many segments, and a segment has as many pages on each rank.

    A rank knows its segments by the page numbers with which they came. A new broker books them under other numbers.
    """

    def __init__(self, segment_pages: int) -> None:
        self._size = segment_pages
        self._held: list[list[tuple[tuple[int, ...], list[int]]]] = []
        """For each segment and rank: the pages as the rank knows them, and as the broker has booked them now."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def pages(self) -> Pages:
        """All pages per rank, in the broker's numbers."""
        return self.by_rank([booked for _, booked in ranks] for ranks in self._held)

    def cut(self, pages: Pages) -> Segments:
        """The segments that these pages of each rank are."""
        ranks = [[numbers[at : at + self._size] for at in range(0, len(numbers), self._size)] for numbers in pages]
        return [list(segment) for segment in zip(*ranks, strict=True)]

    @staticmethod
    def by_rank(segments: Iterable[Sequence[list[int]]]) -> Pages:
        """The pages of all segments per rank; empty when there are no segments."""
        return [[page for pages in rank for page in pages] for rank in zip(*segments, strict=True)]

    def add(self, segments: Segments) -> None:
        self._held += [[(tuple(pages), pages) for pages in ranks] for ranks in segments]

    def rebook(self, pages: Pages) -> None:
        """A new broker has booked what is held: `pages` are in the order of `self.pages`."""
        for ranks, booked in zip(self._held, self.cut(pages), strict=True):
            ranks[:] = [(known, numbers) for (known, _), numbers in zip(ranks, booked, strict=True)]

    def remove(self, given_up: Iterable[Sequence[tuple[int, ...]]]) -> Pages:
        """Takes segments out, one of each rank at a time, by the ranks' numbers. Returns their pages in the broker's
        numbers.

        Ranks may have chosen different ones. Which rank's segment goes with which does not matter: they only count.
        """
        removed = []
        for of_ranks in given_up:
            last = self._held[-1]
            for rank, pages in enumerate(of_ranks):
                ranks = next(ranks for ranks in self._held if ranks[rank][0] == pages)
                ranks[rank], last[rank] = last[rank], ranks[rank]
            removed.append([booked for _, booked in self._held.pop()])
        return self.by_rank(removed)
