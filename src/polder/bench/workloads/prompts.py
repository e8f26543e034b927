"""Prompts that are drawn, not taken from a trace, and the request that asks one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import Turn
from polder.bench.workloads.models import RESERVED_IDS
from polder.bench.workloads.traces import VOCAB

__all__ = ["prompt_of", "questions", "single"]


def prompt_of(tokens: int, entropy: tuple[int, ...], *, vocab: int = VOCAB) -> list[int]:
    """Token ids that are the same for the same entropy, and share no prefix with others."""
    ids: list[int] = np.random.default_rng(entropy).integers(RESERVED_IDS, vocab, size=tokens).tolist()
    return ids


def questions(*, model: str, count: int, longest: int, seed: int, vocab: int = VOCAB) -> list[tuple[str, list[int]]]:
    """(key, prompt) of `count` prompts of up to `longest` tokens; every second one begins like the one before it."""
    rng = np.random.default_rng(seed)
    found: list[tuple[str, list[int]]] = []
    for number in range(count):
        length = int(rng.integers(longest // 3, longest))
        prompt = rng.integers(RESERVED_IDS, vocab, size=length).tolist()
        if number % 2:
            before = found[-1][1]
            prompt = before[: len(before) // 2] + prompt[: longest - len(before) // 2]
        found.append((f"{model}{number}", prompt))
    return found


def single(model: str, key: str, prompt: Sequence[int], *, output_tokens: int) -> Turn:
    """One request whose answer brings its token ids."""
    body = encode_body(model=model, prompt=prompt, output_tokens=output_tokens, extra={"return_token_ids": True})
    return Turn(key=key, body=body, output_tokens=output_tokens)
