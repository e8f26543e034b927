"""Long texts have the length that was asked for, and what is asked about is in them."""

from __future__ import annotations

import pytest

from polder.bench.workloads.retrieval import KINDS, text_of


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_length_that_was_asked_for_and_is_the_same_each_time(kind: str) -> None:
    prompt, more = text_of(kind, letters, 9000, 300)
    assert len(prompt) == 9000
    assert more is None or len(more) == 300
    assert text_of(kind, letters, 9000, 300) == (prompt, more)


def test_what_follows_is_found_in_the_prompt() -> None:
    prompt, more = text_of("quote", letters, 9000, 300)
    assert more is not None
    assert text(more) in text(prompt)[2000:6000]
    prompt, more = text_of("facts", letters, 9000, 300)
    assert more is not None
    for line in text(more).splitlines()[:4]:
        assert line in text(prompt)
