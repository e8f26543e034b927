"""Which engine holds the weights of how many of its layers: who is asked for segments, who waits, who gets them.

The policy (policy.py) divides all pages, so it is told of weights as claims:
  * the engine that wakes has an urgent claim on all that it lacks. If several wake, it is the one that has waited
    longest;
  * segments that may come back because memory is ample have a claim that is not urgent: nothing is preempted for them,
    and the reserve is not used. Who gives segments up is decided in planner/sharing.py, before the policy decides about
    recalls of KV: idle engines give up their weights before running requests are preempted. Segments change hands under
    the same leases as KV units (lease.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from polder.broker.config import BrokerConfig
from polder.broker.policy import Claim, Plan, ample_pages, missing_pages
from polder.broker.roster import Engine, Roster
from polder.broker.wire import Decision, Demand, FromBroker
from polder.errors import ProtocolError
from polder.planner.sharing import Balance, Move, Moves, Pattern, WeightView, arrival_pattern, weight_moves

__all__ = ["Weights"]

IN_FLIGHT_S = 1.0
"""Longer than a message takes from an engine to the broker. An engine at rest reports once a second."""


@dataclass(kw_only=True)
class Weights:
    roster: Roster
    config: BrokerConfig
    started_at: float
    send: Callable[[Engine, FromBroker], None]
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=64))
    turns: deque[str] = field(default_factory=lambda: deque(maxlen=256))
    """The engine of each burst of requests, oldest first."""
    pattern: Pattern = field(default_factory=lambda: arrival_pattern(()))
    """How the engines take turns, measured from `turns`."""
    _ample: dict[str, _Lowest] = field(default_factory=dict)

    # ------------------------------------------------------------------ events

    def demanded(self, engine: Engine, before: Demand | None) -> None:
        """The engine has sent a new Demand. `before`: the one that it replaces."""
        demand = engine.demand
        assert demand is not None
        if not engine.hello.layers:
            return
        if demand.idle_s > 0:
            if demand.asleep and self.roster.asleep(engine):
                # It has no requests: those that it was to wake for were aborted, and a Sleep that was due is carried
                # out. A report that was under way when the operator spoke does not count: a request may have come since.
                if engine.demand_at - engine.weights.sleep_said_at > IN_FLIGHT_S:
                    engine.weights.sleep_due = False
                if not engine.weights.woken:
                    engine.weights.waking_since = None
            return
        if before is None or before.idle_s > 0:
            self.turns.append(engine.name)
            self.pattern = arrival_pattern(self.turns)
        if not self.roster.asleep(engine):
            engine.weights.streamable = self.roster.lacking(engine) + demand.spare_segments

    def need(self, engine: Engine, reason: str, now: float) -> None:
        """The engine is to get all of its weights before anybody gets anything else."""
        if not engine.hello.layers:
            raise ProtocolError(f"{engine.name} has no weights that move")
        weights = engine.weights
        if weights.pinned and not self.roster.asleep(engine):
            return  # an operator wants it to stream, even if that is slower
        if not weights.sleep_due:
            weights.pinned = weights.pinned or None
        if weights.waking_since is None and self._missing(engine):
            weights.waking_since, weights.returning, weights.woken = now, 0, False
            self._note(engine, "wake", self.roster.lacking(engine), reason, now)

    def sleep(self, engine: Engine, now: float) -> None:
        """An operator's order: no weights from the moment when it has no requests, until Wake or its next request."""
        engine.weights.pinned, engine.weights.sleep_due, engine.weights.waking_since = 0, True, None
        engine.weights.returning, engine.weights.sleep_said_at = 0, now
        self._note(engine, "sleep", self.roster.units(engine, "weights"), "an operator put it to sleep", now)

    def wake(self, engine: Engine, now: float) -> None:
        """An operator's order: all weights, as if a request had come."""
        engine.weights.pinned, engine.weights.sleep_due = None, False
        self.need(engine, "an operator woke it", now)
        engine.weights.woken = engine.weights.waking_since is not None

    def stream(self, engine: Engine, segments: int, now: float) -> str | None:
        """An operator's order: this many segments, as soon as possible. Returns why that cannot be."""
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

    def returned(self, engine: Engine, segments: int, *, unasked: bool, now: float) -> None:
        """The engine has given segments back, and the ledger knows it."""
        if segments:
            asked_since = engine.weights.changed_at >= engine.weights.sleep_said_at
            engine.weights.changed_at = now
            if asked_since and self.roster.asleep(engine):
                # It answers a recall from after the operator's word, so what it reports next was not under way then.
                engine.weights.sleep_said_at = -math.inf
            if unasked:
                self._note(engine, "recall", segments, "it gave them up by itself", now)

    # ------------------------------------------------------------------ what the policy is told

    def kv_pages(self, device: str) -> int:
        """Pages of the device that are not weights. Segments that are being given up count as given up."""
        weights = sum(self.roster.pages(engine, device, "weights") for engine in self.roster.engines.values())
        return self.roster.ledger.total(device) - weights + self.coming_pages(device)

    def coming_pages(self, device: str) -> int:
        """Pages of segments that were recalled and are not returned yet."""
        engines = self.roster.engines.values()
        return sum(self._recalled(e) * e.hello.unit_pages_on(device, "weights") for e in engines)

    def claims(self, device: str) -> list[Claim]:
        """Claims on the device's pages: of the engine that wakes, and of those whose segments shall come back.

        If others' weights and floors leave no room for the engine that wakes yet, only what is free is set aside for
        it. To recall more KV would slow down the engines that it waits for, and bring it no nearer.
        """
        returning = [_claim(e, device, e.weights.returning) for e in self.roster.on(device) if e.weights.returning]
        waker, pages = self._waker(), self._waker_pages(device)
        if waker is None or not pages:
            return returning
        floors = sum(self.roster.floor(e) * e.hello.unit_pages_on(device) for e in self.roster.on(device))
        if pages <= self.kv_pages(device) - floors:
            return [Claim(engine=waker.name, pages=pages, urgent=True), *returning]
        free = self.roster.ledger.free(device) // waker.hello.unit_pages_on(device, "weights")
        return [_claim(waker, device, min(free, self.roster.lacking(waker))), *returning]

    # ------------------------------------------------------------------ decisions

    def plan(self, now: float) -> None:
        """Recalls segments whose pages somebody needs, and marks those that shall come back. To be called before the
        policy."""
        movable = [engine for engine in self.roster.engines.values() if engine.hello.layers]
        for engine in movable:
            if engine.weights.waking_since is not None and not self._missing(engine):
                engine.weights.waking_since = None
            self._obey_operator(engine, now)
        devices = {device for engine in movable for device in engine.hello.devices}
        moves = {device: self._moves(device, self._balance(device, now), now) for device in sorted(devices)}
        for engine in movable:
            mine = [moves[device] for device in set(engine.hello.devices)]
            takes = [each.takes[engine.name] for each in mine if engine.name in each.takes]
            gives = [each.gives[engine.name] for each in mine if engine.name in each.gives]
            if takes:
                self._recall(engine, max(takes), now)
            elif len(gives) == len(mine):
                least = min(gives)
                engine.weights.returning += least.segments
                engine.weights.reason = least.reason

    def make_room(self, device: str, pages: int, now: float) -> None:
        """Recalls segments for an engine that cannot be admitted until `pages` more are free."""
        balance = Balance(total_pages=self.roster.ledger.total(device), waker_missing_pages=pages)
        for name, move in self._moves(device, balance, now).takes.items():
            self._recall(self.roster.engines[name], move, now)

    def carry_out(self, plans: Mapping[str, Plan], now: float) -> None:
        """Grants the segments whose pages the policy set aside on all devices. An engine that sleeps gets all or
        none."""
        waker = self._waker()
        for engine in self.roster.engines.values():
            wanted = self.roster.lacking(engine) if engine is waker else engine.weights.returning
            if not wanted or engine.connection is None or self._recalled(engine):
                continue
            set_aside = (
                plans[device].claimed.get(engine.name, 0) // engine.hello.unit_pages_on(device, "weights")
                for device in engine.hello.devices
            )
            count = min(wanted, *set_aside)
            if count == wanted or (count and engine is not waker and not self.roster.asleep(engine)):
                self._grant(engine, count, now)

    def _obey_operator(self, engine: Engine, now: float) -> None:
        """Moves an engine towards what an operator allows it."""
        pinned, held = engine.weights.pinned, self.roster.units(engine, "weights")
        if pinned is None or not self._can_move(engine, now):
            return
        if not pinned and engine.demand is not None and engine.demand.idle_s == 0:
            return  # it has requests, and will say at once when they have ended
        if pinned < held:
            order = f"to stream {engine.hello.layers - pinned} layers" if pinned else "to sleep"
            self._recall(engine, Move(held - pinned, f"an operator put it {order}"), now)
        elif held:
            engine.weights.returning = pinned - held

    def _balance(self, device: str, now: float) -> Balance:
        for_waker = self._waker_pages(device)
        left = self.kv_pages(device) - for_waker
        views = self.roster.views(device, now)
        missing = missing_pages(left, views)
        if missing:
            for engine in self.roster.on(device):
                engine.weights.returning = 0
        ample = 0
        if not for_waker:
            ample = ample_pages(left - sum(claim.pages for claim in self.claims(device)), views)
        lowest = self._ample.setdefault(device, _Lowest(window_s=self.config.sharing.min_hold_s, since=now))
        waker = self._waker()
        waking_since = waker.weights.waking_since if waker is not None else None
        return Balance(
            total_pages=self.roster.ledger.total(device),
            waker_missing_pages=min(missing, for_waker),
            waker_waits_s=now - waking_since if for_waker and waking_since is not None else 0.0,
            kv_missing_pages=max(0, missing - for_waker),
            ample_pages=lowest.observe(ample, now),
        )

    def _moves(self, device: str, balance: Balance, now: float) -> Moves:
        views = [self._view(e, device, now) for e in self.roster.on(device) if self._can_move(e, now)]
        return weight_moves(balance, views, self.pattern, self.config.sharing)

    def _view(self, engine: Engine, device: str, now: float) -> WeightView:
        demand, weights = engine.demand, engine.weights
        age_s = now - engine.demand_at
        held = self.roster.units(engine, "weights")
        return WeightView(
            name=engine.name,
            layers=engine.hello.layers,
            layer_pages=engine.hello.unit_pages_on(device, "weights"),
            segments=held + weights.returning,
            spare_segments=demand.spare_segments if demand else 0,
            streamable=weights.streamable,
            idle_s=demand.idle_s + age_s if demand and demand.idle_s > 0 else 0.0,
            next_use_s=max(0.0, demand.next_use_s - age_s) if demand else math.inf,
            waking=engine is self._waker(),
            # An engine that is to sleep and still has requests takes turns with the others.
            pinned=weights.pinned is not None and not (weights.sleep_due and held),
            since_change_s=now - weights.changed_at,
        )

    def _can_move(self, engine: Engine, now: float) -> bool:
        return engine.hello.layers > 0 and not engine.is_quiet("weights", now) and not self._recalled(engine)

    def _waker(self) -> Engine | None:
        """The engine that has waited longest. One at a time: two that do not fit together would each get half and wait
        for ever."""
        waking = [
            (engine.weights.waking_since, number, engine)
            for number, engine in enumerate(self.roster.engines.values())
            if engine.weights.waking_since is not None and engine.connection is not None
        ]
        return min(waking)[2] if waking else None

    def _waker_pages(self, device: str) -> int:
        """What the engine that wakes lacks on one device: its missing segments and its KV floor."""
        waker = self._waker()
        if waker is None or device not in waker.hello.devices:
            return 0
        kept = max(self.roster.units_on(waker, device, "kv"), self.roster.floor(waker))
        kv = max(0, waker.hello.floor_units - kept) * waker.hello.unit_pages_on(device)
        return self._missing(waker) * waker.hello.unit_pages_on(device, "weights") + kv

    def _recalled(self, engine: Engine) -> int:
        return self.roster.recalled(engine, "weights")

    def _missing(self, engine: Engine) -> int:
        """Segments that it will lack when it has returned what was recalled."""
        return self.roster.lacking(engine) + self._recalled(engine)

    # ------------------------------------------------------------------ messages out

    def _recall(self, engine: Engine, move: Move, now: float) -> None:
        engine.weights.changed_at, engine.weights.returning = now, 0
        self._note(engine, "pause" if move.preempt else "recall", move.segments, move.reason, now)
        leases = self.roster.leases
        self.send(engine, leases.recall(engine.name, "weights", move.segments, preempt=move.preempt, now=now))

    def _grant(self, engine: Engine, segments: int, now: float) -> None:
        weights = engine.weights
        waited = "" if weights.waking_since is None else f"; it waited {(now - weights.waking_since) * 1e3:.0f} ms"
        weights.changed_at, weights.waking_since = now, None
        weights.returning = max(0, weights.returning - segments)
        self._note(engine, "grant", segments, weights.reason + waited, now)
        self.send(engine, self.roster.leases.grant(engine.hello, "weights", segments))

    def _note(self, engine: Engine, action: str, segments: int, reason: str, now: float) -> None:
        engine.weights.reason = reason
        uptime_s = now - self.started_at
        decision = Decision(uptime_s=uptime_s, engine=engine.name, action=action, segments=segments, reason=reason)
        if self.decisions and decision == msgspec.structs.replace(self.decisions[-1], uptime_s=uptime_s):
            return  # the same recall again, because it could not be met before
        self.decisions.append(decision)


@dataclass(kw_only=True)
class _Lowest:
    """The lowest value observed within the last `window_s`. 0 until a whole window was observed."""

    window_s: float
    since: float
    _rising: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, value) of the values below which no later one fell: as many entries as there are different values. A value
    holds until the next one is observed."""

    def observe(self, value: int, now: float) -> int:
        while self._rising and self._rising[-1][1] > value:
            self._rising.pop()
        if not self._rising or self._rising[-1][1] < value:
            self._rising.append((now, value))
        while len(self._rising) > 1 and self._rising[1][0] <= now - self.window_s:
            self._rising.popleft()
        return self._rising[0][1] if now - self.since >= self.window_s else 0


def _claim(engine: Engine, device: str, segments: int) -> Claim:
    """A claim of whole segments that is not urgent."""
    size = engine.hello.unit_pages_on(device, "weights")
    return Claim(engine=engine.name, pages=segments * size, step_pages=size, urgent=False)
