"""Plays requests against OpenAI completions endpoints and writes down when every token came.

Two ways to arrive. Closed loop: a user sends the next turn `think_s` after the last reply ended, so a slow server is
asked less often, as in life. Open loop: every request is sent at its time in the trace, whatever the server does. Both
measure from the moment a request was due, not from when the client got round to sending it (coordinated omission).

The client shares its cores with the engines: bodies are encoded before the run, a chunk is decoded once into a typed
struct, and the client's own CPU time is part of the result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter, process_time
from typing import Any

import httpx
import msgspec

__all__ = [
    *("ClosedLoop", "OpenLoop", "Played", "RequestRecord", "Tally", "Turn", "Workload"),
    *("greedy", "measured_turns", "play", "turns_of"),
]

REQUEST_TIMEOUT_S = 300.0
"""A request silent for longer counts as failed: far above any latency seen, it only keeps a run from hanging."""
DONE = b"[DONE]"
"""The data of the last event of a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One planned request."""

    key: str
    """Names the request in every run of a bench, e.g. "s3t5"."""
    body: bytes
    """The request's JSON."""
    output_tokens: int
    """A reply of another length is a failed request."""
    at_s: float = 0.0
    """Open loop: when it is due, in seconds from the start of the run."""
    think_s: float = 0.0
    """Closed loop: due so long after the end of the last reply."""
    cold_start: bool = False
    """First turn of a user's first session: no system can hold its prefix, so its TTFT is not counted."""
    measured: bool = True
    """False: load only. It keeps pressing while another engine is still being measured."""


def greedy(model: str, key: str, prompt: Sequence[int], output_tokens: int, **fields: Any) -> Turn:
    """A greedy, streamed completion of exactly `output_tokens` tokens, whose ids come along. `fields`: of the turn."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,  # an answer without text might not be sent
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Turn(key=key, body=msgspec.json.encode(body), output_tokens=output_tokens, **fields)


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """Users who wait for their replies. User i starts at `i * stagger_s`."""

    users: Sequence[Sequence[Turn]]
    stagger_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """Requests that come at their own times."""

    turns: Sequence[Turn]


Workload = ClosedLoop | OpenLoop


def turns_of(workload: Workload) -> list[Turn]:
    """All of its requests: in the order of a trace, or of one user after the other."""
    return list(workload.turns) if isinstance(workload, OpenLoop) else list(chain.from_iterable(workload.users))


def measured_turns(workload: Workload) -> int:
    """Requests of a workload that count."""
    return sum(turn.measured for turn in turns_of(workload))


@dataclass(kw_only=True, slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds on the run's clock, 0 at its start."""

    key: str
    scheduled_s: float
    """When it was due: the time in the trace, or when the user was ready."""
    cold_start: bool = False
    measured: bool = True
    sent_s: float = float("nan")
    token_s: list[float] = field(default_factory=list)
    """Arrival of every output token; tokens that came in one chunk share its time."""
    end_s: float = float("nan")
    error: str = ""
    """Empty: the reply came whole."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the engine took from its prefix cache."""
    output_ids: list[int] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of a run while it goes on, for a progress display or for somebody who acts in mid-run."""

    on_end: Callable[[int], None] = lambda _: None
    """Told `ended` whenever a measured request ends."""
    ended: int = 0
    """Measured requests that have ended."""
    output_tokens: int = 0
    over: bool = False
    """The run has ended."""


class Played(msgspec.Struct, kw_only=True):
    """One run."""

    records: dict[str, list[RequestRecord]]
    """Engine -> its finished requests, in order of their ends."""
    started_at: float
    """perf_counter() at the run's second 0."""
    wall_s: float
    client_cpu_s: float
    """CPU seconds of this whole process during the run: driver, sampler, progress display."""


async def play(loads: Mapping[str, tuple[str, Workload]], tally: Tally | None = None) -> Played:
    """Plays all loads (engine -> its URL and workload) at once, until every measured turn of every engine has ended;
    other load is dropped then."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S, pool=None)
    tally = tally or Tally()
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False, verify=False) as client:
        cpu_at = process_time()
        measured = sum(measured_turns(workload) for _, workload in loads.values())
        player = _Player(client, tally, measured, list(loads))
        try:
            async with asyncio.TaskGroup() as group:  # a load that fails ends the run
                tasks = [group.create_task(player.play(name, *load)) for name, load in loads.items()]
                await player.through.wait()
                for task in tasks:
                    task.cancel()
        finally:
            tally.over = True
        return Played(
            records=player.records,
            started_at=player.started_at,
            wall_s=player.now(),
            client_cpu_s=process_time() - cpu_at,
        )


class _Player:
    """Sends the requests of one run and keeps their records."""

    def __init__(self, client: httpx.AsyncClient, tally: Tally, measured: int, engines: Sequence[str]) -> None:
        self.records: dict[str, list[RequestRecord]] = {engine: [] for engine in engines}
        self.started_at = perf_counter()
        self.through = asyncio.Event()
        """Every measured request has ended."""
        self._client, self._tally, self._measured = client, tally, measured
        if not measured:
            self.through.set()

    def now(self) -> float:
        return perf_counter() - self.started_at

    async def play(self, engine: str, url: str, workload: Workload) -> None:
        async with asyncio.TaskGroup() as tasks:
            if isinstance(workload, OpenLoop):
                for turn in workload.turns:
                    tasks.create_task(self._send(engine, url, turn, turn.at_s))
            else:
                for number, turns in enumerate(workload.users):
                    tasks.create_task(self._user(engine, url, turns, number * workload.stagger_s))

    async def _user(self, engine: str, url: str, turns: Sequence[Turn], ready_s: float) -> None:
        for turn in turns:
            ready_s = (await self._send(engine, url, turn, ready_s + turn.think_s)).end_s

    async def _send(self, engine: str, url: str, turn: Turn, due_s: float) -> RequestRecord:
        await asyncio.sleep(max(0.0, due_s - self.now()))
        record = RequestRecord(
            key=turn.key, scheduled_s=due_s, cold_start=turn.cold_start, measured=turn.measured, sent_s=self.now()
        )
        try:
            await self._stream(url, turn, record)
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        record.end_s = self.now()
        if not record.error and len(record.token_s) != turn.output_tokens:
            record.error = f"{len(record.token_s)} tokens came, {turn.output_tokens} were asked for"
        self.records[engine].append(record)
        if turn.measured:
            self._tally.ended += 1
            self._tally.on_end(self._tally.ended)
            if self._tally.ended == self._measured:
                self.through.set()
        return record

    async def _stream(self, url: str, turn: Turn, record: RequestRecord) -> None:
        headers = {"content-type": "application/json"}
        async with self._client.stream("POST", f"{url}/v1/completions", content=turn.body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                record.error = f"HTTP {response.status_code}: {text[:300]}"
                return
            rest = b""
            async for data in response.aiter_raw():
                now_s = self.now()
                *events, rest = (rest + data).split(b"\n\n")
                before = len(record.token_s)
                for event in events:
                    _take(event, now_s, record)
                self._tally.output_tokens += len(record.token_s) - before


class _Details(msgspec.Struct):
    """Sent by vLLM under --enable-prompt-tokens-details."""

    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Comes with the last chunk but one."""

    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    """One event of a stream. Fields that are not named here are skipped unparsed."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()
    """A failure in mid-stream: the status line was 200 by then."""


_decode = msgspec.json.Decoder(_Chunk).decode


def _take(event: bytes, now_s: float, record: RequestRecord) -> None:
    """Enters one server-sent event into the record."""
    data = event.removeprefix(b"data: ")
    if data == DONE or not data:
        return
    chunk = _decode(data)
    if chunk.error:
        record.error = bytes(chunk.error).decode(errors="replace")[:300]
    for choice in chunk.choices:
        record.output_ids += choice.token_ids or []
        record.token_s += [now_s] * len(choice.token_ids or [])
    if chunk.usage:
        record.prompt_tokens = chunk.usage.prompt_tokens
        details = chunk.usage.prompt_tokens_details
        record.cached_tokens = (details.cached_tokens or 0) if details else 0
