"""Traces for the simulator: which blocks each request asks for, and when.

`load_mooncake` is the conversation trace of Mooncake (open loop, one hour). `weka_mix` has closed-loop users that play
the sessions of the WEKA coding agents. Sources and licences are in `data/README.md`. A trace holds no text. A block is
a number that stands for the whole prefix that ends with it, so equal numbers mean equal KV.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import IO

import msgspec
import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray, UintArray, splitmix64
from polder.errors import UsageError

__all__ = ["Trace", "WekaMix", "load_mooncake", "load_trace", "reference_curve", "trace_names", "weka_mix"]


MOONCAKE_BLOCK = 512
MOONCAKE_TICK_S = 3.0
"""The source's clock has steps of three seconds."""
WEKA_BLOCK = 64
MIX_BLOCK = 1024
"""Tokens per block of a mix: sixteen blocks of the source, as the reference curves have it."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A sequence of requests in order of time."""

    name: str
    block_tokens: int
    times_s: npt.NDArray[np.float64]
    """Shape (requests,), not decreasing."""
    starts: IntArray
    """Shape (requests + 1,): request r asks for blocks[starts[r]:starts[r + 1]], first block of its prefix first."""
    blocks: IntArray
    """Block numbers 0, 1, 2 ... in order of first use."""

    @property
    def requests(self) -> int:
        return len(self.times_s)

    @property
    def unique_blocks(self) -> int:
        return int(self.blocks.max()) + 1 if len(self.blocks) else 0

    def of(self, request: int) -> IntArray:
        return self.blocks[self.starts[request] : self.starts[request + 1]]

    def keys(self) -> UintArray:
        """A well mixed 64-bit key for each block number, in place of an engine's block hash. Shape (unique_blocks,)."""
        return splitmix64(np.arange(self.unique_blocks, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


@dataclass(frozen=True, kw_only=True)
class WekaMix:
    """A composition of WEKA sessions."""

    users: int
    clip_s: float
    """The longest wait between two requests of a user; shorter gaps are those of the source."""
    hours: float
    context_tokens: int
    """Sessions with a longer prompt are left out."""
    seed: int = 0


MIXES = {
    "weka-u32-clip60": WekaMix(users=32, clip_s=60.0, hours=1.0, context_tokens=131_072),
    "weka-u32-clip300": WekaMix(users=32, clip_s=300.0, hours=1.0, context_tokens=131_072),
    "weka-u64-clip300": WekaMix(users=64, clip_s=300.0, hours=1.0, context_tokens=200_000),
    "weka-u64-clip600": WekaMix(users=64, clip_s=600.0, hours=2.0, context_tokens=262_144),
}
_REFERENCE_NAMES = {name: f"weka-u{mix.users}-clip{mix.clip_s:.1f}-h{mix.hours:.1f}" for name, mix in MIXES.items()} | {
    "mooncake-conversation": "mooncake-conversation"
}


def trace_names() -> tuple[str, ...]:
    return ("mooncake-conversation", *MIXES)


def load_trace(name: str) -> Trace:
    if name == "mooncake-conversation":
        return load_mooncake()
    if name in MIXES:
        return weka_mix(MIXES[name], name)
    raise UsageError(f"no trace is called {name!r}; there are {', '.join(trace_names())}")


def reference_curve(name: str) -> list[tuple[int, float, float | None]]:
    """(capacity in tokens, LRU's hit ratio, Belady's or None), computed independently of this package."""
    curve = []
    with (files("polder.sim") / "data" / "reference-curves.csv").open("r", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["workload"] == _REFERENCE_NAMES[name] and row["capacity_tokens"] != "inf":
                best = float(row["opt_hit"]) if row["opt_hit"] else None
                curve.append((int(row["capacity_tokens"]), float(row["lru_hit"]), best))
    return sorted(curve)


class _MooncakeRow(msgspec.Struct, frozen=True):
    timestamp: float
    hash_ids: list[int]


def load_mooncake() -> Trace:
    """12,031 requests of a chat service in one hour; blocks of 512 tokens, the last one of a prompt usually partial.

    Requests of one step of the source's clock are spread evenly over the step, in the order of the file.
    """
    with _open("mooncake-conversation") as lines:
        rows = [msgspec.json.decode(line, type=_MooncakeRow) for line in lines]
    ticks = np.array([row.timestamp for row in rows]) / 1e3
    _, first, count = np.unique(ticks, return_index=True, return_counts=True)
    rank = np.arange(len(ticks)) - np.repeat(first, count)
    times = ticks + MOONCAKE_TICK_S * rank / np.repeat(count, count)
    return _trace("mooncake-conversation", MOONCAKE_BLOCK, times, [row.hash_ids for row in rows])


class _WekaRequest(msgspec.Struct, frozen=True, rename={"input_tokens": "in"}):
    """One request, or (type "subagent") a list of them with its own clock and the parent's block ids."""

    t: float
    type: str
    input_tokens: int = 0
    keep: int = 0
    new: list[tuple[int, int]] = []
    requests: list[_WekaRequest] = []


class _WekaSession(msgspec.Struct, frozen=True):
    id: str
    requests: list[_WekaRequest]


def weka_mix(mix: WekaMix, name: str = "weka-mix") -> Trace:
    """`mix.users` users at once, each playing one session after the other, for `mix.hours`. Blocks have 1,024 tokens.

    Sessions are shuffled and handed out in turn. A user starts within the first 10 s, in the middle of a session. A
    sub-agent's requests come where its list stands in the session. Between two requests the user waits for the source's
    gap, at most `mix.clip_s`; between two sessions for a random time up to that. Prompts end with their last whole
    block, and sessions share nothing.
    """
    sessions = [s for s in _weka_sessions() if max(tokens for _, tokens, _ in s) <= mix.context_tokens]
    rng = np.random.default_rng(mix.seed)
    order = rng.permutation(len(sessions)).tolist()
    end_s = mix.hours * 3600.0
    events: list[tuple[float, int, IntArray]] = []
    played = 0
    for _ in range(mix.users):
        now = rng.uniform(0.0, 10.0)
        at = -1
        while now < end_s:
            session = sessions[order[played % len(order)]]
            # A session that is played again is another conversation of the same shape.
            namespace, played = played << 32, played + 1
            at = int(rng.integers(len(session))) if at < 0 else 0
            for number in range(at, len(session)):
                t, _, ids = session[number]
                now += min(max(t - session[number - 1][0], 0.0), mix.clip_s) if number > at else 0.0
                if now >= end_s:
                    break
                events.append((now, len(events), ids + namespace))
            now += rng.uniform(0.0, mix.clip_s)
    events.sort(key=lambda event: event[:2])
    return _trace(name, MIX_BLOCK, np.array([at for at, _, _ in events]), [ids for _, _, ids in events])


@lru_cache(maxsize=1)
def _weka_sessions() -> list[list[tuple[float, int, IntArray]]]:
    """For each session its requests as (seconds, prompt tokens, ids of whole 1,024-token prefixes)."""
    with _open("weka-sessions") as lines:
        decoded = [msgspec.json.decode(line, type=_WekaSession) for line in lines]
    return [list(_flatten(session.requests, 0.0, {})) for session in decoded]


def _flatten(
    requests: list[_WekaRequest], offset_s: float, numbers: dict[tuple[int, bytes], int]
) -> Iterator[tuple[float, int, IntArray]]:
    """Undo the file's delta coding (`keep` ids of the request before, then ranges), and number the 1,024-token prefixes
    of the session.
    """
    ids = np.empty(0, dtype=np.int64)
    per = MIX_BLOCK // WEKA_BLOCK
    for request in requests:
        if request.type == "subagent":
            yield from _flatten(request.requests, offset_s + request.t, numbers)
            continue
        tail = [np.arange(a, b + 1, dtype=np.int64) for a, b in request.new]
        ids = np.concatenate([ids[: request.keep], *tail])
        groups = ids[: len(ids) // per * per].reshape(-1, per)
        prefixes = np.empty(len(groups), dtype=np.int64)
        parent = -1
        for at, group in enumerate(groups):
            parent = prefixes[at] = numbers.setdefault((int(parent), group.tobytes()), len(numbers))
        yield offset_s + request.t, request.input_tokens, prefixes


def _trace(
    name: str, block_tokens: int, times: npt.NDArray[np.float64], prompts: list[list[int]] | list[IntArray]
) -> Trace:
    lengths = np.fromiter((len(prompt) for prompt in prompts), dtype=np.int64, count=len(prompts))
    flat = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
    _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    return Trace(name=name, block_tokens=block_tokens, times_s=times, starts=starts, blocks=number[inverse])


def _open(name: str) -> IO[bytes]:
    import zstandard

    packed = (files("polder.sim") / "data" / f"{name}.jsonl.zst").read_bytes()
    return io.BytesIO(zstandard.ZstdDecompressor().stream_reader(packed).read())
