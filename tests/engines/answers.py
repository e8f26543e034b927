"""What answers must be like, so that their equality says something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

__all__ = ["LONG_ENOUGH", "assert_varied", "varied"]

LONG_ENOUGH = 16
"""Tokens. Shorter answers say too little about whether a model repeats itself."""


def assert_varied(answers: Sequence[Sequence[int]]) -> None:
    """Raises AssertionError unless every answer differs from every other one, and none consists mostly of one token.

    A model that says the same whatever it is asked, or one token for ever, says so with wrong KV, too.
    """
    assert len({tuple(answer) for answer in answers}) == len(answers), "two requests have the same answer"
    for answer in answers:
        token, times = Counter(answer).most_common(1)[0]
        assert 3 * times <= max(6, len(answer)), f"token {token} is {times} of {len(answer)} tokens"
        longest = max(len(list(run)) for _, run in groupby(answer))
        assert longest <= 4, f"a token is repeated {longest} times"


def varied(answers: list[list[int]]) -> list[list[int]]:
    """The answers of stock vLLM, unchanged. Raises AssertionError unless those of at least LONG_ENOUGH tokens vary."""
    assert_varied([answer for answer in answers if len(answer) >= LONG_ENOUGH])
    return answers
