"""The traces of `bench/data`, decoded, and the prompts they stand for.

The files hold lengths, times and block ids of real traffic, scaled down to tiny models (sources and licences in
`data/README.md`). They hold no text: the prompt of a row is made from its block ids by a fixed hash, so that two
prompts share exactly the prefix that the real requests shared.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from polder.arrays import splitmix64
from polder.bench.workloads.models import RESERVED_IDS

__all__ = [
    *("VOCAB", "AgentRow", "BurstRow", "ChatRow", "TenantSlot", "TenantStart", "agent_prompt", "burst_prompt"),
    *("chat_prompt", "drawn_prompt", "ideal_hit_ratio", "load"),
]

VOCAB = 32_000
AGENT_BLOCK = 2
"""Tokens per block id of tiny-agent (64 in the source, divided by 32)."""
CHAT_BLOCK = 32
"""Tokens per block id of tiny-chat (512 in the source, divided by 16)."""

# One namespace per trace, so that equal block ids of different traces give different tokens.
_CHAT_SESSION = 1 << 40
_BURST_SESSION = 1 << 41


class Row(msgspec.Struct, frozen=True, kw_only=True, rename={"input_tokens": "in", "output_tokens": "out"}):
    """One request."""

    input_tokens: int
    output_tokens: int


class AgentRow(Row, frozen=True, kw_only=True):
    """One turn of an agent's session; closed loop, 48 sessions of 16 turns."""

    session: int
    turn: int
    think_s: float
    """Seconds between the last reply's end and this turn."""
    blocks: tuple[tuple[int, int], ...]
    """Inclusive ranges of block ids; they belong to the session alone."""


class ChatRow(Row, frozen=True, kw_only=True):
    """One request of a chat service; open loop, 227 requests in 120 s."""

    t: float
    """Seconds from the start of the trace."""
    blocks: tuple[int, ...]
    """Block ids, common to all conversations; the last block is usually partial."""


class BurstRow(Row, frozen=True, kw_only=True):
    """One request of a code service that reuses nothing; open loop, 238 requests in 120 s, 0 to 43 of them in 5 s."""

    t: float
    """Seconds from the start of the trace."""
    src: int
    """Row of the source file."""


class TenantStart(NamedTuple):
    """The first request of a conversation."""

    at: float
    """Part of the slot that has passed, 0 to 1."""
    input_tokens: int
    output_tokens: int


class TenantSlot(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of time in which one of three models is in use; open loop, 57 slots."""

    slot: int
    tenant: str
    """The model whose load stands highest above its own mean."""
    load: float
    """That load, over its mean."""
    starts: tuple[TenantStart, ...]
    """More than are used: a rate takes evenly spaced ones."""


FILES: dict[type, str] = {
    AgentRow: "tiny-agent-v1",
    ChatRow: "tiny-chat-v1",
    BurstRow: "tiny-burst-v1",
    TenantSlot: "tenants-v1",
}
R = TypeVar("R")


def load(kind: type[R]) -> list[R]:
    """All rows of the trace that consists of them."""
    import zstandard

    with (
        (files("polder.bench") / "data" / f"{FILES[kind]}.jsonl.zst").open("rb") as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as raw,
        io.BufferedReader(raw) as lines,
    ):
        return [msgspec.json.decode(line, type=kind) for line in lines]


def agent_prompt(row: AgentRow) -> list[int]:
    """Token ids of a turn's prompt: two per block id, a hash of (session, block, position)."""
    ids = np.fromiter(chain.from_iterable(range(a, b + 1) for a, b in row.blocks), dtype=np.uint64)
    return _tokens(row.session, ids, AGENT_BLOCK)[: row.input_tokens]


def chat_prompt(row: ChatRow) -> list[int]:
    """Token ids of a chat request's prompt."""
    return _tokens(_CHAT_SESSION, np.array(row.blocks, dtype=np.uint64), CHAT_BLOCK)[: row.input_tokens]


def burst_prompt(row: BurstRow) -> list[int]:
    """Token ids of a burst request's prompt; no two rows share a prefix."""
    return _tokens(_BURST_SESSION + row.src, np.arange(row.input_tokens, dtype=np.uint64), 1)


def drawn_prompt(tokens: int, entropy: tuple[int, ...], vocab: int = VOCAB) -> list[int]:
    """Token ids of no trace, the same for the same entropy; it shares no prefix with others."""
    ids: list[int] = np.random.default_rng(entropy).integers(RESERVED_IDS, vocab, size=tokens).tolist()
    return ids


def ideal_hit_ratio(prompts: Sequence[Sequence[int]], block: int) -> float:
    """Share of prompt tokens that a prefix cache without limit would hold, in whole blocks of `block` tokens."""
    seen: set[int] = set()
    hit = total = 0
    for prompt in prompts:
        total += len(prompt)
        chain_hash = 0
        missed = False
        for end in range(block, len(prompt) + 1, block):
            # Chained: a block counts only behind the same whole prefix, as in vLLM.
            chain_hash = hash((chain_hash, *prompt[end - block : end]))
            missed = missed or chain_hash not in seen
            hit += 0 if missed else block
            seen.add(chain_hash)
    return hit / total


def _tokens(session: int, blocks: npt.NDArray[np.uint64], per_block: int) -> list[int]:
    """Ids from RESERVED_IDS to VOCAB - 1."""
    position = np.arange(per_block, dtype=np.uint64)
    keys = (blocks[:, None] * np.uint64(64) + position[None, :]).ravel()
    salt = splitmix64(np.array([session], dtype=np.uint64))
    return (splitmix64(keys + salt) % np.uint64(VOCAB - RESERVED_IDS) + np.uint64(RESERVED_IDS)).tolist()  # type: ignore[no-any-return]
