"""Segments: which engine holds how many of its layers' pages, asks for them, is asked for them, gets them.

To the policy (policy.py) memory for weights is one more demand, so that one comparison decides about all pages:
  * the engine that wakes, the one that has waited longest if there are several, claims what it lacks as a floor of its own: before
    all others, by recalls that preempt where the policy lets an owner's requests preempt, and nothing that comes free
    meanwhile goes to anybody's cache;
  * segments that shall go back because memory is ample claim it like cache of great worth: nobody is preempted for them, and
    the reserve is not touched.
Who gives segments up is decided in planner/sharing.py, before the recalls, so that weights of idle engines go before running
requests must. Segments given become free only by SegmentsReturned, or when the engine's processes have ended (law 4).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from polder.broker.admission import pages_by_device, take_segments
from polder.broker.config import BrokerConfig
from polder.broker.policy import EngineView, Plan, ample_pages, missing_pages
from polder.broker.roster import Engine, Roster
from polder.broker.wire import (
    Decision,
    Demand,
    FromBroker,
    GiveSegments,
    Segments,
    SegmentsReturned,
    TakeSegments,
)
from polder.errors import ProtocolError
from polder.planner.sharing import Balance, Move, Moves, Pattern, WeightView, arrival_pattern, weight_moves

__all__ = ["Weights"]

RETRY_S = 0.1  # after segments that came back short: time until that engine is asked again
GIVE_DEADLINE_S = 5.0
SOFT = "?"  # ends the name of a claim that is met in segments, and from cache only
WORTH = 1e6  # seconds of prefill a second that a page of returning weights counts for, at least: more than any cache


@dataclass(kw_only=True)
class Weights:
    roster: Roster
    config: BrokerConfig
    started_at: float
    send: Callable[[Engine, FromBroker], None]
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=64))
    turns: deque[str] = field(default_factory=lambda: deque(maxlen=256))
    """The engine of each burst of requests, oldest first ..."""
    pattern: Pattern = field(default_factory=lambda: arrival_pattern(()))
    """... and how they take turns."""
    _ample: dict[str, _Lowest] = field(default_factory=dict)

    # ------------------------------------------------------------------ what happens

    def book_all(self, engine: Engine, now: float) -> Segments:
        """Segments for all layers of a newcomer; their pages must be free."""
        engine.weights.changed_at = now
        engine.weights.reason = "there was room for all of its layers"
        return take_segments(self.roster.ledger, engine, engine.hello.layers)

    def demanded(self, engine: Engine, before: Demand | None) -> None:
        """The engine's new Demand came in the place of `before`."""
        demand = engine.demand
        assert demand is not None
        if not engine.hello.layers:
            return
        if demand.idle_s > 0:
            if demand.asleep and self.roster.asleep(engine):
                self._at_rest(engine)
            return
        if before is None or before.idle_s > 0:
            self.turns.append(engine.name)
            self.pattern = arrival_pattern(self.turns)
        if not self.roster.asleep(engine):
            engine.weights.streamable = self._lacking(engine) + demand.spare_segments

    def wake(self, engine: Engine, reason: str, now: float) -> None:
        """The engine is to get all of its weights before anybody gets anything else."""
        if not engine.hello.layers:
            raise ProtocolError(f"{engine.name} has no weights that move")
        weights = engine.weights
        if weights.pinned and not self.roster.asleep(engine):
            return  # an operator wants it to stream, also when that is slower
        if not weights.sleep_due:
            weights.pinned = weights.pinned or None
        if weights.waking_since is None and self._lacking(engine) + self._taking(engine):
            weights.waking_since, weights.returning, weights.roused = now, 0, False
            self._note(engine, "wake", self._lacking(engine), reason, now)

    def sleep(self, engine: Engine, now: float) -> None:
        """An operator's word: no weights from the moment at which it has no requests until Rouse or its next request."""
        engine.weights.pinned, engine.weights.sleep_due, engine.weights.waking_since = 0, True, None
        engine.weights.returning = 0
        self._note(engine, "sleep", self.roster.segments(engine), "an operator put it to sleep", now)

    def rouse(self, engine: Engine, now: float) -> None:
        """An operator's word: all weights, as if a request had come."""
        engine.weights.pinned, engine.weights.sleep_due = None, False
        self._note(engine, "rouse", self._lacking(engine), "an operator woke it", now)
        self.wake(engine, "an operator woke it", now)
        engine.weights.roused = engine.weights.waking_since is not None

    def stream(self, engine: Engine, segments: int, now: float) -> str | None:
        """An operator's word: so many segments, as soon as it can. Returns why not."""
        if not 0 < segments <= engine.hello.layers:
            return f"{engine.name} has {engine.hello.layers} layers: write a number from 1 to that, or put it to sleep"
        if not engine.hello.streams and segments < engine.hello.layers:
            return (
                f"{engine.name} computes in CUDA graphs, which hold no loads of single layers: it has all of its weights or none. "
                f"Start it with --enforce-eager, or with -cc.cudagraph_mode=PIECEWISE, to let it stream"
            )
        if self.roster.asleep(engine) or engine.weights.waking_since is not None:
            return f"{engine.name} is asleep: wake it first"
        engine.weights.pinned, engine.weights.sleep_due = segments, False
        self._note(engine, "stream", segments, f"an operator lets it have {segments} layers", now)
        return None

    def returned(self, engine: Engine, message: SegmentsReturned, now: float) -> None:
        """Frees what was given back. Raises ProtocolError, having changed nothing, unless it is whole segments of its own."""
        pages = pages_by_device(engine.hello, message.segments)
        self.roster.ledger.give_all_back(engine.weights_owner, pages)
        lease = self.roster.leases.acknowledge(message.lease, engine.name)
        if message.segments:
            engine.weights.changed_at = now
            if lease is None:
                self._note(engine, "take", len(message.segments), "it gave them up by itself", now)
        if message.short:
            engine.weights.quiet_until = now + RETRY_S

    # ------------------------------------------------------------------ what the policy is told

    def kv_pages(self, device: str) -> int:
        """Pages of the device that are no weights, those that are being given up not counted as such."""
        engines = self.roster.engines.values()
        booked = sum(self.roster.ledger.held(device, engine.weights_owner) for engine in engines)
        return self.roster.ledger.total(device) - booked + self.coming_pages(device)

    def coming_pages(self, device: str) -> int:
        """Pages of segments that engines were asked for and have not returned yet."""
        return sum(self._taking(engine) * engine.layer_pages(device) for engine in self.roster.engines.values())

    def claims(self, device: str) -> list[EngineView]:
        """Demands for weights, as the policy sees them: the waker's, once it can be met, and those for segments to give back.

        A waker that others' weights and floors leave no room for yet has only what is free set aside. To recall more would slow
        down those it waits for, and not bring it any nearer.
        """
        claims = [_soft_claim(e, device, e.weights.returning) for e in self._on(device) if e.weights.returning]
        waker, pages = self._waker(), self._waker_pages(device)
        if waker is None or not pages:
            return claims
        floors = sum(self.roster.floor(e) * e.pages_per_unit(device) for e in self._on(device))
        if pages <= self.kv_pages(device) - floors:
            return [_hard_claim(waker, pages), *claims]
        free = self.roster.ledger.free(device) // waker.layer_pages(device)
        return [_soft_claim(waker, device, min(free, self._lacking(waker))), *claims]

    # ------------------------------------------------------------------ decisions

    def plan(self, now: float) -> None:
        """Asks for segments that somebody lacks memory for, and marks those that shall go back. Before the policy decides."""
        movable = [engine for engine in self.roster.engines.values() if engine.hello.layers]
        for engine in movable:
            if engine.weights.waking_since is not None and not self._lacking(engine) + self._taking(engine):
                engine.weights.waking_since = None
            self._obey(engine, now)
        moves = {
            device: self._moves(device, self._balance(device, now), now)
            for device in self.roster.ledger.devices
            if any(device in engine.hello.devices for engine in movable)
        }
        for engine in movable:
            mine = [moves[device] for device in set(engine.hello.devices)]
            takes = [each.takes[engine.name] for each in mine if engine.name in each.takes]
            gives = [each.gives[engine.name] for each in mine if engine.name in each.gives]
            if takes:
                self._take(engine, max(takes), now)
            elif len(gives) == len(mine):
                least = min(gives)
                engine.weights.returning += least.segments
                engine.weights.reason = least.reason

    def make_room(self, device: str, pages: int, now: float) -> None:
        """Takes segments for an engine that cannot be admitted until `pages` more are free."""
        balance = Balance(total_pages=self.roster.ledger.total(device), waker_missing_pages=pages)
        for name, move in self._moves(device, balance, now).takes.items():
            self._take(self.roster.engines[name], move, now)

    def carry_out(self, plans: Mapping[str, Plan], now: float) -> None:
        """Gives the segments for which the policy granted pages on all devices: to one that sleeps, all or none."""
        waker = self._waker()
        for engine in self.roster.engines.values():
            wanted = self._lacking(engine) if engine is waker else engine.weights.returning
            if not wanted or engine.connection is None or self._taking(engine):
                continue
            count = min(wanted, *(self._granted(engine, plans[device], device) for device in engine.hello.devices))
            if count == wanted or (count and engine is not waker and not self.roster.asleep(engine)):
                self._give(engine, count, now)

    def _obey(self, engine: Engine, now: float) -> None:
        """Brings an engine to what an operator lets it have."""
        pinned, held = engine.weights.pinned, self.roster.segments(engine)
        if pinned is None or not self._can_move(engine, now):
            return
        if not pinned and engine.demand is not None and engine.demand.idle_s == 0:
            return  # it has requests, and will say at once when they have ended
        if pinned < held:
            word = f"to stream {engine.hello.layers - pinned} layers" if pinned else "to sleep"
            self._take(engine, Move(held - pinned, f"an operator put it {word}"), now)
        elif held:
            engine.weights.returning = pinned - held

    def _at_rest(self, engine: Engine) -> None:
        """It says that it sleeps and has no requests: if it woke for some, they were aborted, and if it was to sleep, it does."""
        engine.weights.sleep_due = False
        if not engine.weights.roused:
            engine.weights.waking_since = None

    def _granted(self, engine: Engine, plan: Plan, device: str) -> int:
        """Segments whose pages the policy granted on one device."""
        owner = str(engine.weights_owner)
        hard = plan.grants.get(owner, 0) // engine.layer_pages(device)
        return hard + plan.grants.get(owner + SOFT, 0)

    def _balance(self, device: str, now: float) -> Balance:
        for_waker = self._waker_pages(device)
        left = self.kv_pages(device) - for_waker
        views = self.roster.views(device, now)
        missing = missing_pages(left, views)
        if missing:
            for engine in self._on(device):
                engine.weights.returning = 0
        ample = 0 if for_waker else ample_pages(left, [*self.claims(device), *views])
        lately = self._ample.setdefault(device, _Lowest(window_s=self.config.sharing.min_hold_s, since=now))
        return Balance(
            total_pages=self.roster.ledger.total(device),
            waker_missing_pages=min(missing, for_waker),
            waker_waits_s=now - self._waking_since() if for_waker else 0.0,
            kv_missing_pages=max(0, missing - for_waker),
            ample_pages=lately.observe(ample, now),
        )

    def _moves(self, device: str, balance: Balance, now: float) -> Moves:
        views = [self._view(engine, device, now) for engine in self._on(device) if self._can_move(engine, now)]
        return weight_moves(balance, views, self.pattern, self.config.sharing)

    def _view(self, engine: Engine, device: str, now: float) -> WeightView:
        demand, weights = engine.demand, engine.weights
        age_s = now - engine.demand_at
        return WeightView(
            name=engine.name,
            layers=engine.hello.layers,
            layer_pages=engine.layer_pages(device),
            segments=self.roster.segments(engine) + weights.returning,
            spare_segments=demand.spare_segments if demand else 0,
            streamable=weights.streamable,
            idle_s=demand.idle_s + age_s if demand and demand.idle_s > 0 else 0.0,
            next_use_s=max(0.0, demand.next_use_s - age_s) if demand else math.inf,
            waking=weights.waking_since is not None,
            # One that is to sleep and has requests yet takes turns with the others.
            pinned=weights.pinned is not None and not (weights.sleep_due and self.roster.segments(engine)),
            since_change_s=now - weights.changed_at,
        )

    def _can_move(self, engine: Engine, now: float) -> bool:
        ready = engine.connection is not None and now >= engine.weights.quiet_until
        return engine.hello.layers > 0 and ready and not self._taking(engine)

    def _waker(self) -> Engine | None:
        """One after another, in the order in which they asked: two that cannot both fit would each get half, and wait for ever."""
        waking = [
            (engine.weights.waking_since, number, engine)
            for number, engine in enumerate(self.roster.engines.values())
            if engine.weights.waking_since is not None and engine.connection is not None
        ]
        return min(waking)[2] if waking else None

    def _waking_since(self) -> float:
        waker = self._waker()
        assert waker is not None
        assert waker.weights.waking_since is not None
        return waker.weights.waking_since

    def _waker_pages(self, device: str) -> int:
        """What the waker lacks on one device: its missing segments, and its KV floor."""
        waker = self._waker()
        if waker is None or device not in waker.hello.devices:
            return 0
        lacking = self._lacking(waker) + self._taking(waker)
        counted = max(self.roster.held(waker, device), self.roster.floor(waker))
        units = max(0, waker.hello.floor_units - counted)
        return lacking * waker.layer_pages(device) + units * waker.pages_per_unit(device)

    def _on(self, device: str) -> list[Engine]:
        return [engine for engine in self.roster.engines.values() if device in engine.hello.devices]

    def _lacking(self, engine: Engine) -> int:
        return engine.hello.layers - self.roster.segments(engine)

    def _taking(self, engine: Engine) -> int:
        return min(self.roster.segments(engine), self.roster.leases.units(engine.name, "take"))

    # ------------------------------------------------------------------ messages out

    def _take(self, engine: Engine, move: Move, now: float) -> None:
        deadline_s = self.config.policy.deadline_s
        lease = self.roster.leases.open("take", engine.name, move.segments, now=now, deadline_s=deadline_s)
        engine.weights.changed_at, engine.weights.returning = now, 0
        self._note(engine, "pause" if move.preempt else "take", move.segments, move.reason, now)
        message = TakeSegments(lease=lease.number, segments=move.segments, deadline_s=deadline_s, preempt=move.preempt)
        self.send(engine, message)

    def _give(self, engine: Engine, segments: int, now: float) -> None:
        weights = engine.weights
        waited = "" if weights.waking_since is None else f"; it waited {(now - weights.waking_since) * 1e3:.0f} ms"
        lease = self.roster.leases.open("give", engine.name, segments, now=now, deadline_s=GIVE_DEADLINE_S)
        pages = take_segments(self.roster.ledger, engine, segments)
        weights.changed_at, weights.waking_since = now, None
        weights.returning = max(0, weights.returning - segments)
        self._note(engine, "give", segments, weights.reason + waited, now)
        self.send(engine, GiveSegments(lease=lease.number, segments=pages))

    def _note(self, engine: Engine, action: str, segments: int, reason: str, now: float) -> None:
        engine.weights.reason = reason
        uptime_s = now - self.started_at
        decision = Decision(uptime_s=uptime_s, engine=engine.name, action=action, segments=segments, reason=reason)
        if self.decisions and decision == msgspec.structs.replace(self.decisions[-1], uptime_s=uptime_s):
            return  # it is asked again for what it could not do before
        self.decisions.append(decision)


@dataclass(kw_only=True)
class _Lowest:
    """The lowest of the values that were observed within the last `window_s`; 0 before there is a window's worth of them."""

    window_s: float
    since: float
    _rising: deque[tuple[float, int]] = field(default_factory=deque)
    """(since when, value) of those that no later one is below: at most as many as there are different values. The first held on
    until the second came."""

    def observe(self, value: int, now: float) -> int:
        while self._rising and self._rising[-1][1] > value:
            self._rising.pop()
        if not self._rising or self._rising[-1][1] < value:
            self._rising.append((now, value))
        while len(self._rising) > 1 and self._rising[1][0] <= now - self.window_s:
            self._rising.popleft()
        return self._rising[0][1] if now - self.since >= self.window_s else 0


def _hard_claim(engine: Engine, pages: int) -> EngineView:
    """In pages: those of requests within a share."""
    return EngineView(name=str(engine.weights_owner), pages_per_unit=1, floor=pages, share=pages, ceiling=pages, held=0)


def _soft_claim(engine: Engine, device: str, segments: int) -> EngineView:
    """In segments: cache of great worth, and most when it is all there, so that the policy weighs it as one."""
    size = engine.layer_pages(device)
    return EngineView(
        name=str(engine.weights_owner) + SOFT,
        pages_per_unit=size,
        floor=0,
        share=segments,
        ceiling=segments,
        held=0,
        curve=[WORTH * size * count**2 for count in range(segments + 1)],
    )
