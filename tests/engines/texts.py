"""Prompts for real models, made of English prose."""

from __future__ import annotations

from polder.demo.texts import PASSAGES

__all__ = ["passages_of"]


def passages_of(count: int, each: int, first: int = 0) -> list[str]:
    """`count` prompts of `each` passages. No two begin with the same one, for up to as many as there are passages."""
    found = []
    for number in range(first, first + count):
        chosen = [PASSAGES[(number + 3 * step) % len(PASSAGES)].text for step in range(each)]
        found.append("\n\n".join(passage.replace("\n", " ") for passage in chosen) + "\n\n")
    return found
