"""Prometheus text: Polder's own figures, and every vLLM's metrics under an `engine` label. Names are frozen by a test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from polder.broker.wire import EngineStatus, Status
from polder.serve.supervisor import ChildStatus

__all__ = ["merge", "render", "unit_bytes"]

_ENGINE_SIZES = {
    "held": "Memory mapped or being mapped",
    "busy": "What running requests need",
    "waiting": "What waiting requests need in addition",
    "cached": "Memory that holds reusable KV",
    "target": "What the policy wants it to hold",
    "floor": "Never taken from it",
    "share": "Its own on demand",
    "ceiling": "The most it can hold",
    "borrowed": "Held above its share",
    "lent": "Missing from its share while others hold it",
}
_ENGINE_GAUGES = {
    "running": ("running_requests", "Requests being worked on"),
    "waiting": ("waiting_requests", "Requests that wait for their turn"),
    "segments": ("segments", "Layers whose weights have memory on the device"),
    "weights_rotating_layers": ("weights_rotating_layers", "Layers streamed in every pass"),
    "kv_used_ratio": ("kv_used_ratio", "Part of its blocks that running requests hold"),
    "lent_offered_bytes": ("lent_offered_bytes", "Its idle KV memory on offer to others"),
    "lent_borrowed_bytes": ("lent_borrowed_bytes", "Of this, what others hold"),
    "lent_recall_p99_seconds": (
        "lent_recall_p99_seconds",
        "Waiting for a borrower when taking a block back, the last 4096 times",
    ),
    "disk_written_bytes_per_day": (
        "disk_written_bytes_per_day",
        "Bytes a day written to its disks, at the rate of the last hour, all ranks",
    ),
    "disk_disks_ok": ("disk_disks_ok", "Its disks that can be read and written, each counted once a rank"),
}
_ENGINE_COUNTERS = {
    "prefix_queries_tokens_total": "Prompt tokens looked up in the prefix cache",
    "prefix_hits_tokens_total": "Prompt tokens found in the prefix cache",
    "preemptions_total": "Requests preempted, for whatever reason",
    "polder_preemptions_total": "Requests preempted to give memory back",  # exported as giveback_preemptions_total
    "grows_total": "Times it grew",
    "shrinks_total": "Times it shrank",
    "grow_seconds_total": "Time spent growing, between steps",
    "shrink_seconds_total": "Time spent shrinking, between steps",
    "migrated_blocks_total": "Blocks moved out of units that were given back",
    "evicted_blocks_total": "Cached blocks lost to shrinking",
    "steps_total": "Engine steps",
    "paced_steps_total": "Steps whose prefill was cut short for the time that a token may take (tbt_goal)",
    "late_steps_total": "Steps with tokens of running requests that took longer than tbt_goal",
    "wakes_total": "Times it got its weights back after sleep",
    "sleeps_total": "Times it gave all of its weights up",
    "pauses_total": "Times it did so with requests, which stood still until it was its turn again",
    "wake_seconds_total": "Waiting for memory for the weights, from request to mapped pages",
    "weights_loaded_bytes_total": "Bytes of weights copied from the host, a rank",
    "weights_stall_seconds_total": "Computing waited for layers, a rank",
    "lent_recalls_total": "Blocks on offer that it took back for itself",
    "lent_borrowed_recalls_total": "Of these, blocks that somebody had borrowed",
    "disk_written_bytes_total": "Bytes written to its disks, second copies included, all ranks",
    "disk_copied_bytes_total": "Of these, second copies of pages that are read most",
    "disk_spilled_blocks_total": "Blocks written from host memory to disk",
    "disk_admission_refused_blocks_total": "Blocks not written to disk, because too few like them are read again",
    "disk_budget_refused_blocks_total": "Blocks not written to disk, because the day's writes (disk_writes) are used up",
}
_GIVEBACK_EDGES_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)


def render(status: Status | None, children: Sequence[ChildStatus] = ()) -> str:
    """Polder's own metrics as Prometheus text. `status` None: the broker does not answer, only the children are known."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Own(status, children))
    return generate_latest(registry).decode()


def unit_bytes(engine: EngineStatus, status: Status) -> int:
    """Bytes of one unit of the engine, on all its ranks together."""
    pages = {device.device: device.page_bytes for device in status.devices}
    return engine.pages_per_unit * sum(pages.get(device, 0) for device in engine.devices)


class _Own(Collector):
    def __init__(self, status: Status | None, children: Sequence[ChildStatus]) -> None:
        self._status, self._children = status, children

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("polder_broker_up", "Whether the broker answers", value=self._status is not None)
        if self._children:
            up = GaugeMetricFamily("polder_child_ready", "Whether the process is up and ready", labels=["child"])
            restarts = CounterMetricFamily("polder_child_restarts", "Restarts since the fleet began", labels=["child"])
            for child in self._children:
                up.add_metric([child.name], child.state == "ready")
                restarts.add_metric([child.name], child.restarts)
            yield from (up, restarts)
        if self._status is not None:
            yield from _devices(self._status)
            yield from _broker(self._status)
            yield from _engines(self._status)


def _devices(status: Status) -> Iterator[Metric]:
    total = GaugeMetricFamily("polder_device_total_bytes", "The KV budget", labels=["device"])
    free = GaugeMetricFamily("polder_device_free_bytes", "Memory that nobody holds", labels=["device"])
    page = GaugeMetricFamily("polder_device_page_bytes", "Size of a page", labels=["device"])
    held = GaugeMetricFamily("polder_device_held_bytes", "Memory by owner and use", labels=["device", "engine", "use"])
    for device in status.devices:
        total.add_metric([device.device], device.total_pages * device.page_bytes)
        free.add_metric([device.device], device.free_pages * device.page_bytes)
        page.add_metric([device.device], device.page_bytes)
        for owner, pages in device.pages_by_owner.items():
            engine, _, use = owner.rpartition("/")
            held.add_metric([device.device, engine, use], pages * device.page_bytes)
    yield from (total, free, page, held)


def _broker(status: Status) -> Iterator[Metric]:
    yield GaugeMetricFamily("polder_broker_uptime_seconds", "Time since the broker began", value=status.uptime_s)
    yield CounterMetricFamily("polder_grants", "Times memory was given to an engine", value=status.grants)
    yield CounterMetricFamily("polder_recalls", "Times memory was asked back", value=status.recalls)
    yield CounterMetricFamily("polder_overdue_recalls", "Recalls past their deadline", value=status.overdue)
    yield CounterMetricFamily("polder_refused_messages", "Messages refused", value=status.refused_messages)
    yield CounterMetricFamily("polder_reclaimed_pages", "Pages of dead engines", value=status.reclaimed_pages)


def _engines(status: Status) -> Iterator[Metric]:
    text = "From its need within its share to mapped pages, the last 512 times"
    giveback = HistogramMetricFamily("polder_engine_giveback_seconds", text, labels=["engine"])
    state = GaugeMetricFamily("polder_engine_state", "1 for the state it is in", labels=["engine", "state"])
    unit = GaugeMetricFamily("polder_engine_unit_bytes", "The step in which it grows", labels=["engine"])
    recalled = CounterMetricFamily("polder_engine_recalled_bytes", "Given back on recall", labels=["engine"])
    sizes = {k: GaugeMetricFamily(f"polder_engine_{k}_bytes", v, labels=["engine"]) for k, v in _ENGINE_SIZES.items()}
    gauges = {
        key: GaugeMetricFamily(f"polder_engine_{name}", text, labels=["engine"])
        for key, (name, text) in _ENGINE_GAUGES.items()
    }
    counters = {
        key: CounterMetricFamily(f"polder_engine_{key.replace('polder_', 'giveback_')}", text, labels=["engine"])
        for key, text in _ENGINE_COUNTERS.items()
    }
    for engine in status.engines:
        label, size = [engine.engine], unit_bytes(engine, status)
        state.add_metric([engine.engine, engine.state], 1)
        unit.add_metric(label, size)
        recalled.add_metric(label, engine.recalled_units * size)
        for key, gauge in sizes.items():
            gauge.add_metric(label, getattr(engine, f"{key}_units") * size)
        times = engine.giveback_ms  # a window: its counts fall, too
        buckets = [(str(edge / 1e3), float(sum(t <= edge for t in times))) for edge in _GIVEBACK_EDGES_MS]
        giveback.add_metric(label, [*buckets, ("+Inf", float(len(times)))], sum_value=sum(times) / 1e3)
        for key, family in (gauges | counters).items():
            if key in engine.stats:
                family.add_metric(label, engine.stats[key])
    yield from (state, unit, recalled, giveback, *sizes.values(), *gauges.values(), *counters.values())


# ---------------------------------------------------------------- joining texts

# Inside a label's value a quote is escaped, so this finds label names only.
_ENGINE_LABEL = re.compile(r'([{,]\s*)engine="')


def merge(texts: Iterable[tuple[str, str]]) -> str:
    """Joins (engine, Prometheus text) pairs: samples get the engine's label, each family its HELP and TYPE once.

    Values are not parsed: they stay digit for digit what vLLM printed. vLLM's own `engine` label (the data-parallel rank)
    becomes `exported_engine`, as Prometheus itself would name it. A pair with an empty engine is passed on as it stands.
    """
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for engine, text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                heads.setdefault(family, {}).setdefault(line[:7], line)
                samples.setdefault(family, [])
            elif line and not line.startswith("#"):
                name = re.split(r"[{ ]", line, maxsplit=1)[0]
                owner = family if family and name.startswith(family) else name
                samples.setdefault(owner, []).append(_labelled(line, engine) if engine else line)
    lines: list[str] = []
    for family, found in samples.items():
        if found:
            lines += [*heads.get(family, {}).values(), *found]
    return "\n".join(lines) + "\n"


def _labelled(line: str, engine: str) -> str:
    name = re.split(r"[{ ]", line, maxsplit=1)[0]
    if line[len(name)] != "{":
        return f'{name}{{engine="{engine}"}}{line[len(name) :]}'
    labels = _ENGINE_LABEL.sub(r'\1exported_engine="', line[len(name) :])[1:].lstrip()
    return f'{name}{{engine="{engine}"{"" if labels.startswith("}") else ","}{labels}'
