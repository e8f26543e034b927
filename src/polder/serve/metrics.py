"""Prometheus text: the broker's and the engines' own figures, and every vLLM's metrics under an `engine` label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from polder.broker.wire import EngineStatus, Status

__all__ = ["METRIC_NAMES", "merge_engine_metrics", "render_status"]

_ENGINE_GAUGES = {
    "held_units": "Units mapped or being mapped",
    "busy_units": "Units that running requests need",
    "waiting_units": "Units more that waiting requests need",
    "cached_units": "Units' worth of blocks that hold reusable KV",
    "target_units": "What the policy wants it to hold",
    "floor_units": "Never taken from it",
    "share_units": "Its own on demand",
    "ceiling_units": "The most it can hold",
    "borrowed_units": "Held above its share",
    "lent_units": "Missing from its share while others borrow",
}
_ENGINE_STATS = {
    "prefix_queries_tokens_total": "Prompt tokens looked up in the prefix cache",
    "prefix_hits_tokens_total": "Prompt tokens found in the prefix cache",
    "preemptions_total": "Requests preempted, for whatever reason",
    "polder_preemptions_total": "Requests preempted to give memory back",
    "grows_total": "Times it grew",
    "shrinks_total": "Times it shrank",
    "grow_seconds_total": "Time spent growing, between steps",
    "shrink_seconds_total": "Time spent shrinking, between steps",
    "migrated_blocks_total": "Blocks moved out of units that were given back",
    "evicted_blocks_total": "Cached blocks lost to shrinking",
    "steps_total": "Engine steps",
}
_GIVEBACK_BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)
METRIC_NAMES = tuple(
    sorted(
        [
            "polder_device_pages",
            "polder_device_free_pages",
            "polder_device_page_bytes",
            "polder_owner_pages",
            "polder_grants_total",
            "polder_recalls_total",
            "polder_overdue_recalls_total",
            "polder_refused_messages_total",
            "polder_reclaimed_pages_total",
            "polder_giveback_seconds",
            "polder_engine_recalled_units_total",
            *(f"polder_engine_{name}" for name in (*_ENGINE_GAUGES, *_ENGINE_STATS)),
        ]
    )
)
"""Public: dashboards depend on them. Frozen by a test."""


class _StatusCollector(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from self._devices()
        yield from self._broker()
        yield from _engines(self._status.engines)

    def _devices(self) -> Iterator[Metric]:
        total = GaugeMetricFamily("polder_device_pages", "Pages of the KV budget", labels=["device"])
        free = GaugeMetricFamily("polder_device_free_pages", "Pages nobody owns", labels=["device"])
        size = GaugeMetricFamily("polder_device_page_bytes", "Bytes of a page", labels=["device"])
        owned = GaugeMetricFamily("polder_owner_pages", "Pages by owner and use", labels=["device", "engine", "use"])
        for device in self._status.devices:
            total.add_metric([device.device], device.total_pages)
            free.add_metric([device.device], device.free_pages)
            size.add_metric([device.device], device.page_bytes)
            for owner, pages in device.pages_by_owner.items():
                engine, _, use = owner.rpartition("/")
                owned.add_metric([device.device, engine, use], pages)
        yield from (total, free, size, owned)

    def _broker(self) -> Iterator[Metric]:
        status = self._status
        yield CounterMetricFamily("polder_grants", "Times memory was given to an engine", value=status.grants)
        yield CounterMetricFamily("polder_recalls", "Times memory was asked back", value=status.recalls)
        yield CounterMetricFamily("polder_overdue_recalls", "Recalls past their deadline", value=status.overdue)
        yield CounterMetricFamily("polder_refused_messages", "Messages refused", value=status.refused_messages)
        yield CounterMetricFamily("polder_reclaimed_pages", "Pages of dead engines", value=status.reclaimed_pages)
        times = sorted(status.giveback_ms)
        buckets = [(str(edge / 1e3), float(sum(t <= edge for t in times))) for edge in _GIVEBACK_BUCKETS_MS]
        histogram = HistogramMetricFamily("polder_giveback_seconds", "From an owner's need to mapped pages, last 512")
        histogram.add_metric([], [*buckets, ("+Inf", float(len(times)))], sum_value=sum(times) / 1e3)
        yield histogram


def _engines(engines: list[EngineStatus]) -> Iterator[Metric]:
    for name, text in _ENGINE_GAUGES.items():
        gauge = GaugeMetricFamily(f"polder_engine_{name}", text, labels=["engine"])
        for engine in engines:
            gauge.add_metric([engine.engine], getattr(engine, name))
        yield gauge
    recalled = CounterMetricFamily("polder_engine_recalled_units", "Units given back on recall", labels=["engine"])
    for engine in engines:
        recalled.add_metric([engine.engine], engine.recalled_units)
    yield recalled
    for name, text in _ENGINE_STATS.items():
        counter = CounterMetricFamily(f"polder_engine_{name}", text, labels=["engine"])
        for engine in engines:
            counter.add_metric([engine.engine], engine.stats.get(name, 0.0))
        yield counter


def render_status(status: Status) -> str:
    """The status as Prometheus text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StatusCollector(status))
    return generate_latest(registry).decode()


def merge_engine_metrics(texts: Iterable[tuple[str, str]]) -> str:
    """Joins (engine, Prometheus text) pairs: each sample gets the engine's label, each family its HELP and TYPE once."""
    families: dict[str, Metric] = {}
    for engine, text in texts:
        for family in text_string_to_metric_families(text):
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "engine": engine}
                joined.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)

    class Joined(Collector):
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Joined())
    return generate_latest(registry).decode()
