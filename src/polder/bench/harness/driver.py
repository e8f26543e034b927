"""Plays requests against OpenAI completions endpoints and writes down when every token came.

Two ways to arrive. Closed loop: a user sends the next turn `think_s` after the last reply ended, so a slow server is
asked less often, as in life. Open loop: every request is sent at its time in the trace, whatever the server does. Both
measure from the moment a request was due, not from when the client got round to sending it (coordinated omission).

The client shares its cores with the engines: bodies are encoded before the run, a chunk is decoded once into a typed
struct, and the client's own CPU time is part of the result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time

import httpx

from polder.bench.harness.completions import DONE, decode_chunk, token_ids

__all__ = [
    "ClosedLoop",
    "Endpoint",
    "OpenLoop",
    "Played",
    "RequestRecord",
    "Tally",
    "Turn",
    "Workload",
    "measured_turns",
    "play",
]

REQUEST_TIMEOUT_S = 300.0
"""A request silent for longer counts as failed: far above any latency seen, it only keeps a run from hanging."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One planned request."""

    key: str
    """Names the request in every run of a bench, e.g. "s3t5"."""
    body: bytes
    """The request's JSON, see `polder.bench.harness.completions.encode_body`."""
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


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an engine answers."""

    base_url: str


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

    ended: int = 0
    """Measured requests that have ended."""
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Played:
    """One run."""

    records: dict[str, list[RequestRecord]]
    """Engine -> its finished requests, in order of their ends."""
    started_at: float
    """perf_counter() at the run's second 0."""
    wall_s: float
    client_cpu_s: float
    """CPU seconds of this whole process during the run: driver, sampler, progress display."""


async def play(workloads: Mapping[str, tuple[Endpoint, Workload]], tally: Tally | None = None) -> Played:
    """Plays all workloads at once, until every measured turn of every engine has ended; other load is dropped then."""
    tally = tally or Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S, pool=None)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False, verify=False) as client:
        cpu_at, started_at = process_time(), perf_counter()
        players = {name: _Player(client, endpoint, started_at, tally) for name, (endpoint, _) in workloads.items()}
        loads = [asyncio.create_task(players[name].play(workload)) for name, (_, workload) in workloads.items()]
        measured = [
            asyncio.create_task(players[name].wait_for(measured_turns(workload)))
            for name, (_, workload) in workloads.items()
        ]
        try:
            # A load that ends early ends well; one that fails is a bug of ours and must not leave the others waiting.
            waiting = set(measured)
            while waiting:
                done, _ = await asyncio.wait([*waiting, *loads], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                waiting -= done
                loads = [task for task in loads if task not in done]
        finally:
            for task in [*loads, *measured]:
                task.cancel()
            await asyncio.gather(*loads, *measured, return_exceptions=True)
        return Played(
            records={name: player.records for name, player in players.items()},
            started_at=started_at,
            wall_s=perf_counter() - started_at,
            client_cpu_s=process_time() - cpu_at,
        )


def measured_turns(workload: Workload) -> int:
    """Requests of a workload that count."""
    turns = workload.turns if isinstance(workload, OpenLoop) else [t for user in workload.users for t in user]
    return sum(turn.measured for turn in turns)


class _Player:
    """Plays one engine's workload and keeps its records."""

    def __init__(self, client: httpx.AsyncClient, endpoint: Endpoint, started_at: float, tally: Tally) -> None:
        self.records: list[RequestRecord] = []
        self._client = client
        self._url = f"{endpoint.base_url}/v1/completions"
        self._started_at = started_at
        self._tally = tally
        self._ended = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    async def play(self, workload: Workload) -> None:
        async with asyncio.TaskGroup() as tasks:
            if isinstance(workload, OpenLoop):
                for turn in workload.turns:
                    tasks.create_task(self._send_at(turn, turn.at_s))
            else:
                for number, turns in enumerate(workload.users):
                    tasks.create_task(self._user(turns, number * workload.stagger_s))

    async def wait_for(self, measured: int) -> None:
        reached = asyncio.Event()
        if self._ended < measured:
            self._waiting.append((measured, reached))
            await reached.wait()

    async def _user(self, turns: Sequence[Turn], ready_s: float) -> None:
        for turn in turns:
            record = await self._send_at(turn, ready_s + turn.think_s)
            ready_s = record.end_s

    async def _send_at(self, turn: Turn, due_s: float) -> RequestRecord:
        await asyncio.sleep(max(0.0, due_s - self._now()))
        record = RequestRecord(
            key=turn.key, scheduled_s=due_s, cold_start=turn.cold_start, measured=turn.measured, sent_s=self._now()
        )
        try:
            await self._stream(turn, record)
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        record.end_s = self._now()
        if not record.error and len(record.token_s) != turn.output_tokens:
            record.error = f"{len(record.token_s)} tokens came, {turn.output_tokens} were asked for"
        self.records.append(record)
        if turn.measured:
            self._ended += 1
            self._tally.ended += 1
            for measured, reached in self._waiting:
                if self._ended >= measured:
                    reached.set()
        return record

    async def _stream(self, turn: Turn, record: RequestRecord) -> None:
        headers = {"content-type": "application/json"}
        async with self._client.stream("POST", self._url, content=turn.body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                record.error = f"HTTP {response.status_code}: {text[:300]}"
                return
            rest = b""
            async for data in response.aiter_raw():
                now = self._now()
                *events, rest = (rest + data).split(b"\n\n")
                before = len(record.token_s)
                for event in events:
                    _take(event, now, record)
                self._tally.output_tokens += len(record.token_s) - before

    def _now(self) -> float:
        return perf_counter() - self._started_at


def _take(event: bytes, now_s: float, record: RequestRecord) -> None:
    """Enters one server-sent event into the record."""
    data = event.removeprefix(b"data: ")
    if data == DONE or not data:
        return
    chunk = decode_chunk(data)
    if chunk.error:
        record.error = bytes(chunk.error).decode(errors="replace")[:300]
    for choice in chunk.choices:
        ids = token_ids(choice)
        record.output_ids += ids
        record.token_s += [now_s] * len(ids)
    if chunk.usage:
        record.prompt_tokens = chunk.usage.prompt_tokens
        details = chunk.usage.prompt_tokens_details
        record.cached_tokens = (details.cached_tokens or 0) if details else 0
