"""The words engines, tools and the broker exchange over one Unix socket.

A message is a 4-byte little-endian length and that many bytes of MessagePack: one of the structs below, tagged by `t`.
File descriptors travel beside the first byte of a message (SCM_RIGHTS). A message over MAX_MESSAGE bytes, or one that
does not decode to a struct of the expected direction, closes the connection it came by and harms nobody else.

    engine core  ── Hello ──────────────► broker        once per connection; on reconnection `held` is not empty
                 ◄── Welcome ────────────               the first units, or Refused
                 ── Demand ─────────────►               whenever it changes, at most every 50 ms, at least every second
                 ◄── Grant ──────────────               pages to map
                 ── Grown ──────────────►               they are mapped and offered to the scheduler
                 ◄── Recall ─────────────               give `units` back before `deadline_s`
                 ── Returned ───────────►               the acknowledgement: these pages are unmapped
                 ── Wake ───────────────►               a request came: it wants the weights of all its layers
                 ◄── GiveSegments ───────               pages for layers' weights, answered by Grown
                 ◄── TakeSegments ───────               give that many layers' pages back before `deadline_s`
                 ── SegmentsReturned ───►               the acknowledgement: these are unmapped
    worker       ── Fetch ──────────────► broker        handles of pages it is about to map: its own, or lent ones
                 ◄── Handles + fds ──────
    engine core  ◄── Neighbours ────────  broker        whenever an engine comes or goes: who lends, who lives
                 ── FetchCopy ──────────►               the host copy of some weights, to fill or to share
                 ◄── CopyFile + fd ──────               or Refused
                 ── CopyFilled ─────────►               others may have it
                 ◄── Done ───────────────
                 ── Stock ──────────────►               it serves as stock vLLM, in place of Hello
                 ◄── Done ───────────────
    both         ── FetchTable ─────────► broker        the table of a lender's blocks (tiers/lending.py)
                 ◄── Table + fd ─────────
    anybody      ── StatusRequest ──────► broker
                 ◄── Status ─────────────
    operator     ── Resize ─────────────► broker        pin an engine to a number of units (0 = let the policy decide)
                 ◄── Done / Refused ─────
                 ── Sleep, Rouse ───────►               an engine shall give up all of its weights, or get them back
                 ── Stream ─────────────►               it shall hold the weights of so many layers and stream the others
                 ◄── Done / Refused ─────
"""

from __future__ import annotations

import math

import msgspec

__all__ = [
    "MAX_FDS",
    "MAX_MESSAGE",
    "PROTOCOL",
    "CopyFile",
    "CopyFilled",
    "Decision",
    "Demand",
    "DeviceStatus",
    "Done",
    "EngineStatus",
    "Fetch",
    "FetchCopy",
    "FetchTable",
    "FromBroker",
    "GiveSegments",
    "Grant",
    "Grown",
    "Handles",
    "Hello",
    "Neighbours",
    "Pages",
    "Recall",
    "Refused",
    "Resize",
    "Returned",
    "Rouse",
    "Segments",
    "SegmentsReturned",
    "Sleep",
    "Status",
    "StatusRequest",
    "Stock",
    "Stream",
    "Table",
    "TakeSegments",
    "ToBroker",
    "Wake",
    "Welcome",
]

PROTOCOL = 1
MAX_MESSAGE = 4 << 20
MAX_FDS = 250  # the kernel's SCM_MAX_FD is 253

Pages = list[list[int]]
"""Pages of some units: one list per rank, each `units * pages_per_unit` page numbers of that rank's device, unit by unit."""

Segments = list[list[list[int]]]
"""For each segment, per rank, its `layer_pages` page numbers of that rank's device."""


class Message(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    """Root of all messages."""


# ---------------------------------------------------------------- to the broker


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """An engine core presents itself. Sizes are in units: one page in every layer, on every rank."""

    engine: str
    model: str
    protocol: int = PROTOCOL
    devices: list[str]
    """The device of each rank, e.g. ["cpu:0"] or ["cuda:0", "cuda:1"]."""
    page_bytes: int
    """0: whatever the broker uses."""
    pages_per_unit: int
    """Pages of one unit on each rank."""
    unit_tokens: int
    """Tokens whose KV fits one unit."""
    floor_units: int
    ceiling_units: int
    share_units: int
    """Guaranteed on demand; what an engine holds above it is on loan. 0: an equal part of the device."""
    host_pages: int = 0
    """Pages of host memory that each rank wants for its host tier, for as long as the engine lives."""
    table_bytes: int = 0
    """Above 0: this engine lends, and wants a table of that size."""
    held: dict[int, list[list[int]]] = {}
    """On reconnection: unit -> pages per rank (one list a rank)."""
    layers: int = 0
    """Decoder layers whose weights move. 0: they stay where they are, and the broker knows nothing of them."""
    layer_pages: int = 0
    """Pages of one segment, a layer's weights, on each rank."""
    streams: bool = True
    """Whether it can serve with fewer segments than layers. With CUDA graphs it has all or none."""
    held_segments: Segments = []
    """On reconnection: the segments that it holds."""
    reserve_bytes: list[int] = []
    """What each rank will still take from its device while it computes: activations, graphs. Empty: not known."""


class Demand(Message, frozen=True, kw_only=True, tag="demand"):
    """What an engine holds, uses and could use. The numbers are in units unless named otherwise."""

    held_units: int
    busy_units: int
    """Needed for the blocks of running requests, now."""
    waiting_units: int
    """Needed in addition by requests that wait for memory (capped by the ceiling)."""
    peak_units: int
    """Largest busy + waiting of the last seconds (decaying)."""
    cached_units: int
    """Blocks that hold reusable KV, busy ones included."""
    curve: list[float]
    """Expected seconds of prefill saved per second with 0, 1, 2, ... units of cache (non-decreasing)."""
    urgent: bool
    """A request cannot be scheduled for want of memory."""
    stats: dict[str, float] = {}
    """Counters and gauges shown by `polder top` and Prometheus, see EngineStatus.stats."""
    asleep: bool = False
    """It holds no weights. Its KV floor does not count meanwhile: it can give up all of its units but one."""
    spare_segments: int = 0
    """What it could give up now: while it serves, what its own cost formula allows it to stream; idle: all."""
    idle_s: float = 0.0
    """Since its last request ended; 0 while it has any."""
    next_use_s: float = math.inf
    """Until its next request, as it predicts from its own record of arrivals."""
    layer_load_s: float = 0.0
    """Measured time to bring one layer back; 0: never measured."""


class Grown(Message, frozen=True, kw_only=True, tag="grown"):
    """The pages of a grant are mapped, zeroed and offered to the scheduler."""

    lease: int


class Returned(Message, frozen=True, kw_only=True, tag="returned"):
    """Pages unmapped on every rank. Fewer units than recalled (`short`) means the rest is impossible now."""

    lease: int
    """The recall this answers; 0: given back unasked."""
    pages: list[list[int]]
    short: int = 0


class SegmentsReturned(Message, frozen=True, kw_only=True, tag="segments-returned"):
    """Segments unmapped on every rank. Fewer than asked for (`short`) means the rest is impossible now."""

    lease: int
    """The TakeSegments this answers; 0: given back unasked."""
    segments: Segments
    short: int = 0


class Wake(Message, frozen=True, kw_only=True, tag="wake"):
    """The engine wants the weights of all its layers, before anybody gets anything else. To be said again on a new connection."""


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """A worker asks for handles: one per page on CUDA; on the CPU one file stands for all pages."""

    engine: str
    rank: int
    device: str
    pages: list[int]
    lender: str = ""
    """Not empty: the pages are under this engine's KV cache, and some of their blocks are lent."""


class FetchTable(Message, frozen=True, kw_only=True, tag="table?"):
    """Asks for the table of a lender's blocks; a lender asks for its own."""

    engine: str
    lender: str


class FetchCopy(Message, frozen=True, kw_only=True, tag="copy?"):
    """Asks for the host copy of the weights that `key` names: model, precision, ranks and this one's number."""

    key: str


class CopyFilled(Message, frozen=True, kw_only=True, tag="copied"):
    """The file that the sender got to fill is full and sealed."""

    key: str


class Stock(Message, frozen=True, kw_only=True, tag="stock"):
    """This engine serves as stock vLLM: it takes no memory from the broker, and gives none. Answered by Done."""

    engine: str
    reason: str


class StatusRequest(Message, frozen=True, kw_only=True, tag="status?"):
    pass


class Resize(Message, frozen=True, kw_only=True, tag="resize"):
    """Pin an engine to `units` (tests, benchmarks, operators). 0 hands it back to the policy."""

    engine: str
    units: int


class Stream(Message, frozen=True, kw_only=True, tag="stream"):
    """An engine that is awake shall hold so many segments, and stream its other layers, until Rouse or Sleep."""

    engine: str
    segments: int


class Sleep(Message, frozen=True, kw_only=True, tag="sleep"):
    """An engine shall give up all of its weights as soon as it is idle, and not get them back before Rouse or its own Wake."""

    engine: str


class Rouse(Message, frozen=True, kw_only=True, tag="rouse"):
    """An engine shall get all of its weights back."""

    engine: str


# ---------------------------------------------------------------- from the broker


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    generation: int
    """Changes when the broker restarts: pages of another generation must be discarded when given back."""
    page_bytes: int
    lease: int
    pages: list[list[int]]
    """Per rank: the floor's pages (those of one unit, if it starts asleep), or the numbers under which the reported units are
    booked, in rising order of units. Those are others than reported only if the engine came back so late that its own numbers
    had been granted again."""
    share_units: int
    ceiling_units: int
    """Clipped to what the device can ever spare."""
    host: list[list[int]] = []
    """Per rank: its pages of host memory."""
    segments: Segments = []
    """Pages for the weights of all its layers; none: it starts asleep, there is no room now. On reconnection the numbers under
    which the reported segments are booked, in their order."""


class Neighbours(Message, frozen=True, kw_only=True, tag="neighbours"):
    """All engines here, the receiver included."""

    lenders: list[str]
    """Engines with a table, in the order in which they came; a lender that came back with a new process has a new table."""
    pids: list[int]
    """Processes of the lenders' cores, in the same order."""
    cores: list[int]
    """Processes of all engines' cores."""


class Table(Message, frozen=True, kw_only=True, tag="table"):
    """The table's file descriptor comes with it."""


class CopyFile(Message, frozen=True, kw_only=True, tag="copy"):
    """A memory file comes with it: of another process's weights, or empty, to be filled by the receiver."""

    filled: bool


class Grant(Message, frozen=True, kw_only=True, tag="grant"):
    lease: int
    units: int
    pages: list[list[int]]


class Recall(Message, frozen=True, kw_only=True, tag="recall"):
    lease: int
    units: int
    deadline_s: float
    """Seconds from now until the pages must be back."""
    preempt: bool
    """True: preempt running requests if nothing else frees enough. False: only idle and cached memory."""


class GiveSegments(Message, frozen=True, kw_only=True, tag="give-segments"):
    """To an engine that sleeps, all of its segments at once."""

    lease: int
    segments: Segments


class TakeSegments(Message, frozen=True, kw_only=True, tag="take-segments"):
    lease: int
    segments: int
    deadline_s: float
    """Seconds from now until they must be back."""
    preempt: bool = False
    """True: all of them, though it has requests, which stand still until it has its weights again. It asks for them at once."""


class Handles(Message, frozen=True, kw_only=True, tag="handles"):
    """`fds` file descriptors come with it: handle i is (fds[fd_index[i]], offsets[i])."""

    generation: int
    page_bytes: int
    fd_index: list[int]
    offsets: list[int]


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    model: str
    pid: int
    devices: list[str]
    state: str
    """"serving" | "overdue" (a recall passed its deadline) | "silent" (its connection broke, it serves on with what it
    holds) | "gone" (its core ended, its pages are not back yet)."""
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
    """Held above its share: on loan from the others."""
    lent_units: int
    """Missing from its share while others hold it."""
    recalled_units: int
    """Given back on recall since it came."""
    reason: str
    """Why the policy chose the target, in words."""
    curve: list[float]
    giveback_ms: list[float]
    """The last 512 times, in milliseconds, from its need (of what is within its share) to mapped pages, newest last."""
    stats: dict[str, float]
    """Metrics by the names that polder/metrics.py declares."""
    layers: int = 0
    """Decoder layers whose weights move."""
    layer_pages: int = 0
    segments: int = 0
    """Of them held; fewer than `layers` and more than 0: the others are streamed."""
    asleep: bool = False
    """It holds none of its weights."""
    weights_reason: str = ""
    """Why it holds these, in words."""


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    page_bytes: int
    total_pages: int
    free_pages: int
    pages_by_owner: dict[str, int]
    """ "engine/use" -> pages, use one of kv, weights, staging, lent; "free" is not listed."""
    uuid: str = ""
    """Of a GPU: its number means another device to a process with another CUDA_VISIBLE_DEVICES."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was decided about an engine's weights."""

    uptime_s: float
    """When: Status.uptime_s of that moment."""
    engine: str
    action: str
    """"take" | "pause" (take, though it has requests) | "give" | "wake" | "sleep" | "rouse" | "stream"."""
    segments: int
    reason: str


class Status(Message, frozen=True, kw_only=True, tag="status"):
    generation: int
    uptime_s: float
    devices: list[DeviceStatus]
    engines: list[EngineStatus]
    grants: int
    recalls: int
    overdue: int
    refused_messages: int
    reclaimed_pages: int
    """Pages taken back from dead engines."""
    giveback_ms: list[float]
    """Those of all engines, see EngineStatus.giveback_ms; newest last."""
    decisions: list[Decision] = []
    """The last 64, newest last."""
    stock: dict[str, str] = {}
    """Engines that serve as stock vLLM, with the reason."""


class Done(Message, frozen=True, kw_only=True, tag="done"):
    pass


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """The request cannot be met; `reason` says what to change."""

    reason: str
    retry_s: float = 0.0
    """Above 0: nothing needs changing, ask again after that time."""


ToBroker = (
    Hello
    | Demand
    | Grown
    | Returned
    | SegmentsReturned
    | Wake
    | Fetch
    | FetchTable
    | FetchCopy
    | CopyFilled
    | Stock
    | StatusRequest
    | Resize
    | Sleep
    | Rouse
    | Stream
)
FromBroker = (
    Welcome
    | Grant
    | Recall
    | GiveSegments
    | TakeSegments
    | Handles
    | Neighbours
    | Table
    | CopyFile
    | Status
    | Done
    | Refused
)
