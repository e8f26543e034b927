"""The roster as a wire.Status: what `polder top`, `ctl explain` and the metrics show."""

from __future__ import annotations

from polder.broker.roster import Engine, Roster
from polder.broker.wire import DeviceStatus, EngineStatus

__all__ = ["device_status", "engine_status"]


def device_status(roster: Roster, device: str, page_bytes: int, uuid: str) -> DeviceStatus:
    statistics = roster.ledger.statistics(device)
    return DeviceStatus(
        device=device,
        uuid=uuid,
        page_bytes=page_bytes,
        total_pages=statistics.total,
        free_pages=statistics.free,
        pages_by_owner={str(owner): pages for owner, pages in sorted(statistics.by_owner.items())},
    )


def engine_status(roster: Roster, engine: Engine) -> EngineStatus:
    hello, demand = engine.hello, engine.demand
    held, share = roster.units(engine, "kv"), roster.share(engine)
    on_loan = any(roster.units(other, "kv") > roster.share(other) for other in roster.others(engine))
    return EngineStatus(
        engine=engine.name,
        model=hello.model,
        pid=engine.pid,
        devices=hello.devices,
        state=_state(roster, engine),
        pages_per_unit=hello.pages_per_unit,
        unit_tokens=hello.unit_tokens,
        held_units=held,
        floor_units=hello.floor_units,
        share_units=share,
        ceiling_units=roster.ceiling(engine),
        target_units=engine.target.units,
        pinned_units=engine.pinned,
        busy_units=demand.busy_units if demand else 0,
        waiting_units=demand.waiting_units if demand else 0,
        cached_units=demand.cached_units if demand else 0,
        borrowed_units=max(0, held - share),
        lent_units=max(0, share - held) if on_loan else 0,
        recalled_units=engine.recalled_total,
        reason=engine.target.reason,
        curve=demand.curve if demand else [],
        giveback_ms=list(engine.giveback_ms),
        stats=demand.stats if demand else {},
        layers=hello.layers,
        layer_pages=hello.layer_pages,
        segments=roster.units(engine, "weights"),
        asleep=roster.asleep(engine),
        weights_reason=engine.weights.reason,
    )


def _state(roster: Roster, engine: Engine) -> str:
    if not engine.alive:
        return "gone"
    if roster.leases.is_overdue(engine.name):
        return "overdue"
    return "silent" if engine.connection is None else "serving"
