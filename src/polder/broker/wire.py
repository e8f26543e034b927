"""The messages that engines, tools and the broker exchange over one Unix socket.

A message is a 4-byte little-endian length and that many bytes of MessagePack: one of the structs below, tagged by `t`.
File descriptors travel with the first byte of a message (SCM_RIGHTS). A message over MAX_MESSAGE bytes, or one that
does not decode to a struct of the expected direction, closes the connection it came by. No other connection is
affected.

Pages change hands in units, under leases. There is one lease for both uses of pages:

    use       unit                                     pages of a unit on each rank
    kv        one page in every layer                  Hello.pages_per_unit
    weights   the weights of one decoder layer         Hello.layer_pages
              (a segment)

    engine core  ── Hello ──────────────► broker        once per connection; after a reconnection `held` is not empty
                 ◄── Welcome ────────────               the first units, or Refused
                 ── Demand ─────────────►               when it changes, at most every 50 ms, at least every second
                 ── NeedWeights ────────►               a request waits for the weights of this engine
                 ◄── Grant ──────────────               pages to map, for one use
                 ── Grown ──────────────►               they are mapped and in use
                 ◄── Recall ─────────────               give `units` of one use back before `deadline_s`
                 ── Returned ───────────►               these pages are unmapped
    worker       ── Fetch ──────────────► broker        handles of pages it is about to map: its own, or lent ones
                 ◄── Handles + fds ──────
    engine core  ◄── Neighbours ────────  broker        whenever an engine comes or goes: who lends, who lives
                 ── FetchCopy ──────────►               the host copy of some weights, to fill or to share
                 ◄── CopyFile + fd ──────               or Refused
                 ── CopyFilled ─────────►               other engines may use it now
                 ◄── Done ───────────────
                 ── Stock ──────────────►               it serves as stock vLLM; sent in place of Hello
                 ◄── Done ───────────────
    both         ── FetchTable ─────────► broker        the table of blocks that an engine lends (tiers/peer/lending.py)
                 ◄── Table + fd ─────────
    anybody      ── StatusRequest ──────► broker
                 ◄── Status ─────────────
    operator     ── Resize ─────────────► broker        pin an engine to a number of KV units (0: the policy decides)
                 ── Sleep, Wake ────────►               an engine shall give up all of its weights, or get them back
                 ── Stream ─────────────►               it shall hold the weights of some layers and stream the others
                 ◄── Done / Refused ─────
"""

from __future__ import annotations

import math
import os
from typing import Literal

import msgspec

PROTOCOL = 3
MAX_MESSAGE = 4 << 20
MAX_FDS = 250  # the kernel's SCM_MAX_FD is 253

Use = Literal["kv", "weights"]
USES: tuple[Use, ...] = ("kv", "weights")

Pages = list[list[int]]
"""Pages of some units of one use: one list per rank, with the page numbers on that rank's device, unit after unit."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The pages that one engine holds, by use. An empty list stands for no pages on any rank."""

    kv: Pages = []
    weights: Pages = []

    def __bool__(self) -> bool:
        return any(self.kv) or any(self.weights)

    def of(self, use: Use) -> Pages:
        return self.kv if use == "kv" else self.weights


class Message(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    """Base class of all messages."""


# ---------------------------------------------------------------- to the broker


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """An engine core introduces itself. Sizes are in units of KV cache unless named otherwise."""

    engine: str
    model: str
    protocol: int = PROTOCOL
    pid: int = msgspec.field(default_factory=os.getpid)
    """The engine core's process id, as it sees it. The broker must see the same one."""
    devices: list[str]
    """The device of each rank, e.g. ["cpu:0"] or ["cuda:0", "cuda:1"]."""
    page_bytes: int
    """Size of its pages, which must be the broker's. 0: whatever that is."""
    pages_per_unit: int
    """Pages of one KV unit on each rank."""
    unit_tokens: int
    """Tokens whose KV cache fits in one unit."""
    floor_units: int
    ceiling_units: int
    share_units: int
    """The engine gets this much whenever it needs it. What it holds above its share is borrowed. 0: an equal part of
    the device."""
    host_pages: int = 0
    """Pages of host memory for the host tier of each rank, for the lifetime of the engine."""
    table_bytes: int = 0
    """Above 0: this engine lends blocks and needs a table of that size."""
    layers: int = 0
    """Decoder layers whose weights can move. 0: the weights stay where they are and are not booked by the broker."""
    layer_pages: int = 0
    """Pages of one segment, the weights of one layer, on each rank."""
    streams: bool = True
    """Whether the engine can serve with fewer segments than layers. With CUDA graphs it needs all of them."""
    held: Held = msgspec.field(default_factory=Held)
    """After a reconnection: what the engine holds, KV units in rising order."""
    reserve_bytes: list[int] = []
    """Device memory that each rank will still allocate while it computes: activations, graphs. Empty: not known."""

    def unit_pages(self, use: Use) -> int:
        """Pages of one unit on each rank."""
        return self.pages_per_unit if use == "kv" else self.layer_pages

    def unit_pages_on(self, device: str, use: Use = "kv") -> int:
        """Pages of one unit on one device, all ranks together. 0 when the engine has no rank there."""
        return self.unit_pages(use) * self.devices.count(device)


class Demand(Message, frozen=True, kw_only=True, tag="demand"):
    """What an engine holds, uses and could use. Numbers are in KV units unless named otherwise."""

    held_units: int
    busy_units: int
    """Needed now, for the blocks of running requests."""
    waiting_units: int
    """Needed in addition by requests that wait for memory, up to the ceiling."""
    peak_units: int
    """Largest busy + waiting of the last seconds."""
    cached_units: int
    """Units of blocks that hold reusable KV, busy ones included."""
    curve: list[float]
    """Expected seconds of prefill saved per second with 0, 1, 2, ... units of cache. Non-decreasing."""
    urgent: bool
    """A request cannot be scheduled because memory is missing."""
    stats: dict[str, float] = {}
    """Counters and gauges shown by `polder top` and Prometheus, see EngineStatus.stats."""
    asleep: bool = False
    """The engine holds no weights. Meanwhile its KV floor is one unit."""
    spare_segments: int = 0
    """Segments that it could give up now. While it serves: those that it could stream without delay. While idle:
    all."""
    idle_s: float = 0.0
    """Time since its last request ended; 0 while it has any."""
    next_use_s: float = math.inf
    """Time until its next request, predicted by the engine from its past arrivals."""
    layer_load_s: float = 0.0
    """Measured time to copy one layer back; 0: never measured."""


class Grown(Message, frozen=True, kw_only=True, tag="grown"):
    """The pages of a grant are mapped and in use. KV pages are zeroed first."""

    lease: int


class Returned(Message, frozen=True, kw_only=True, tag="returned"):
    """These pages are unmapped on every rank. It answers a Recall, gives a Grant back, or comes unasked."""

    lease: int
    """The Recall or Grant that this answers; 0: none."""
    use: Use
    pages: Pages
    short: int = 0
    """Units that were recalled and cannot be given back now."""


class NeedWeights(Message, frozen=True, kw_only=True, tag="need-weights"):
    """The engine needs the weights of all its layers. It comes before every other demand. To be repeated on a new
    connection."""


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """A worker asks for handles: one per page on CUDA; on the CPU one file stands for all pages."""

    engine: str
    rank: int
    device: str
    pages: list[int]
    lender: str = ""
    """Not empty: the pages belong to the KV cache of this engine, which lends blocks in them."""


class FetchTable(Message, frozen=True, kw_only=True, tag="table?"):
    """Asks for a lender's table of lent blocks. A lender asks for its own."""

    engine: str
    lender: str


class FetchCopy(Message, frozen=True, kw_only=True, tag="copy?"):
    """Asks for the host copy of some weights. `key` names model, precision, number of ranks and rank."""

    key: str


class CopyFilled(Message, frozen=True, kw_only=True, tag="copied"):
    """The sender has filled and sealed the file that it got."""

    key: str


class Stock(Message, frozen=True, kw_only=True, tag="stock"):
    """This engine serves as stock vLLM and uses no memory of the broker. Answered by Done."""

    engine: str
    reason: str


class StatusRequest(Message, frozen=True, kw_only=True, tag="status?"):
    pass


class Resize(Message, frozen=True, kw_only=True, tag="resize"):
    """Pins an engine to `units` of KV cache. 0: the policy decides again."""

    engine: str
    units: int


class Stream(Message, frozen=True, kw_only=True, tag="stream"):
    """An engine that is awake shall hold this many segments and stream its other layers, until Wake or Sleep."""

    engine: str
    segments: int


class Sleep(Message, frozen=True, kw_only=True, tag="sleep"):
    """An engine shall give up all of its weights as soon as it is idle. They come back with Wake, or with its next
    request."""

    engine: str


class Wake(Message, frozen=True, kw_only=True, tag="wake"):
    """An engine shall get all of its weights back."""

    engine: str


# ---------------------------------------------------------------- from the broker


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    generation: int
    """Changes when the broker restarts. Pages of an earlier generation must be destroyed when they are given back."""
    lease: int
    """The lease of the first KV units, to be answered by Grown. 0 after a reconnection."""
    held: Held
    """At first: the pages of the KV floor and of all layers' weights. If the weights do not fit now, the engine starts
    asleep, with one KV unit. After a reconnection: the numbers under which the reported pages are booked, in the same
    order. They differ from the reported ones if those were granted to others before the engine came back."""
    share_units: int
    ceiling_units: int
    """At most what the device can ever spare."""
    host: Pages = []
    """Host memory for the host tier."""


class Neighbours(Message, frozen=True, kw_only=True, tag="neighbours"):
    """All engines of this broker, the receiver included."""

    lenders: list[str]
    """Engines with a table, in order of arrival. A lender that returns with a new process has a new table."""
    pids: list[int]
    """Process ids of the lenders' engine cores, in the same order."""
    cores: list[int]
    """Process ids of all engine cores."""


class Table(Message, frozen=True, kw_only=True, tag="table"):
    """Carries the file descriptor of the table."""


class CopyFile(Message, frozen=True, kw_only=True, tag="copy"):
    """Carries the descriptor of a memory file: full, or empty for the receiver to fill."""

    filled: bool


class Grant(Message, frozen=True, kw_only=True, tag="grant"):
    """Pages to map. An engine that sleeps gets its weights all at once."""

    lease: int
    use: Use
    units: int
    pages: Pages


class Recall(Message, frozen=True, kw_only=True, tag="recall"):
    lease: int
    use: Use
    units: int
    deadline_s: float
    """Seconds from now until the pages must be back."""
    preempt: bool = False
    """False: only idle and cached memory; weights that are not needed. True, for KV: preempt running requests if
    nothing else frees enough. True, for weights: all of them; requests stand still until the weights are back, for
    which the engine asks."""


class Handles(Message, frozen=True, kw_only=True, tag="handles"):
    """Carries file descriptors `fds`. Handle i is (fds[fd_index[i]], offsets[i])."""

    generation: int
    fd_index: list[int]
    offsets: list[int]


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    model: str
    pid: int
    devices: list[str]
    state: str
    """ "serving" | "overdue" (a recall passed its deadline) | "silent" (its connection broke; it serves on with what it
    holds) | "gone" (its core ended; its pages are not back yet)."""
    pages_per_unit: int
    unit_tokens: int
    held_units: int
    floor_units: int
    share_units: int
    ceiling_units: int
    target_units: int
    pinned_units: int
    busy_units: int
    waiting_units: int
    cached_units: int
    borrowed_units: int
    """Held above its share."""
    lent_units: int
    """Missing from its share because others hold it."""
    recalled_units: int
    """KV units that it gave back on recall, since its start."""
    reason: str
    """Why the policy chose the target."""
    curve: list[float]
    giveback_ms: list[float]
    """The last 512 times, newest last, from a need within its share until its pages were mapped."""
    stats: dict[str, float]
    """Metrics by the names that polder/metrics.py declares."""
    layers: int = 0
    """Decoder layers whose weights can move."""
    layer_pages: int = 0
    segments: int = 0
    """Layers whose weights it holds. It streams the others; at 0 it sleeps."""
    asleep: bool = False
    weights_reason: str = ""
    """Why it holds this many."""


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    page_bytes: int
    total_pages: int
    free_pages: int
    pages_by_owner: dict[str, int]
    """ "engine/use" -> pages, with use kv, weights or lent (the host tier). Free pages are not listed."""
    uuid: str = ""
    """UUID of a GPU. Its number alone means another device to a process with another CUDA_VISIBLE_DEVICES."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """A decision about the weights of an engine."""

    uptime_s: float
    """Status.uptime_s at that moment."""
    engine: str
    action: str
    """ "recall" | "pause" (a recall although it has requests) | "grant" | "wake" | "sleep" | "stream"."""
    segments: int
    reason: str


class Status(Message, frozen=True, kw_only=True, tag="status"):
    generation: int
    uptime_s: float
    devices: list[DeviceStatus]
    engines: list[EngineStatus]
    grants: int
    """Grants of KV units so far."""
    recalls: int
    """Recalls of KV units so far."""
    overdue: int
    """Recalls of either use that ever passed their deadline."""
    refused_messages: int
    reclaimed_pages: int
    """Pages that came back because their engine died."""
    giveback_ms: list[float]
    """EngineStatus.giveback_ms of all engines together, newest last."""
    decisions: list[Decision] = []
    """The last 64, newest last."""
    stock: dict[str, str] = {}
    """Engines that serve as stock vLLM -> the reason."""


class Done(Message, frozen=True, kw_only=True, tag="done"):
    pass


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """The request cannot be met. `reason` says what to change."""

    reason: str
    retry_s: float = 0.0
    """Above 0: nothing needs to change; ask again after this time."""


FromEngine = Hello | Demand | Grown | Returned | NeedWeights | Stock | FetchCopy | CopyFilled
FromWorker = Fetch | FetchTable
FromOperator = Resize | Sleep | Wake | Stream
ToBroker = FromEngine | FromWorker | FromOperator | StatusRequest
FromBroker = Welcome | Grant | Recall | Handles | Neighbours | Table | CopyFile | Status | Done | Refused
