"""Blocks as pages of a disk: their 16-byte keys, and what a job says of them beside their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from polder.arrays import IntArray
from polder.diskstore.keys import Keys

__all__ = ["Pages", "no_keys", "short_keys"]


@dataclass(frozen=True, kw_only=True)
class Pages:
    """n blocks of one part of a job, in its order."""

    keys: Keys
    """[n, 2]."""
    sources: IntArray
    """[n] slots of the host tier to write from. Empty for a load."""
    stripes: IntArray
    """[n] consecutive numbers for consecutive blocks of a prefix, from a start that differs between prefixes: which disk each
    page goes to follows from that. Empty for a load."""


def short_keys(keys: Sequence[bytes]) -> Keys:
    """[n, 2] the keys that a store knows blocks by: xxh3 (128 bits) over vLLM's whole key, so blocks of two KV cache groups are
    two pages. Any length will do."""
    digest = xxhash.xxh3_128_digest
    words = np.frombuffer(b"".join([digest(key) for key in keys]), dtype="<u8")
    return words.reshape(-1, 2).astype(np.uint64)


def no_keys() -> Keys:
    return np.empty((0, 2), dtype=np.uint64)
