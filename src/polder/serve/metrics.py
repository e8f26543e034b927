"""Prometheus text: Polder's own metrics (declared in polder/metrics.py), and every vLLM's under an `engine` label."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from polder import metrics
from polder.broker.wire import DeviceStatus, EngineStatus, Status
from polder.metrics import Metric
from polder.serve.child import ChildStatus

__all__ = ["merge", "render", "unit_bytes"]

_GIVEBACK_EDGES_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)


class _Sample(NamedTuple):
    name: str
    labels: tuple[str, ...]
    value: float


def render(status: Status | None, children: Sequence[ChildStatus] = ()) -> str:
    """Polder's own metrics as Prometheus text. `status` None: the broker does not answer, only the children are
    known."""
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

    def collect(self) -> Iterator[Family]:
        yield from _families("polder_", metrics.BROKER, (), _of_broker(self._status))
        samples = (sample for child in self._children for sample in _of_child(child))
        yield from _families("polder_child_", metrics.CHILD, ("child",), samples)
        if self._status is None:
            return
        samples = (sample for device in self._status.devices for sample in _of_device(device))
        yield from _families("polder_device_", metrics.DEVICE, ("device",), samples)
        samples = (sample for engine in self._status.engines for sample in _of_engine(engine, self._status))
        yield from _families("polder_engine_", (*metrics.STATUS, *metrics.ENGINE), ("engine",), samples)
        giveback = HistogramMetricFamily("polder_engine_giveback_seconds", metrics.GIVEBACK.help, labels=["engine"])
        for engine in self._status.engines:
            times = engine.giveback_ms  # the last times only: these counts fall, too
            buckets = [(str(edge / 1e3), float(sum(t <= edge for t in times))) for edge in _GIVEBACK_EDGES_MS]
            sum_s = sum(times) / 1e3
            giveback.add_metric([engine.engine], [*buckets, ("+Inf", float(len(times)))], sum_value=sum_s)
        yield giveback


def _families(
    prefix: str, declared: Sequence[Metric], owner: tuple[str, ...], samples: Iterable[_Sample]
) -> Iterator[Family]:
    """A family for each declared metric that has samples. `owner`: the label that all of them have."""
    found: dict[str, list[_Sample]] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append(sample)
    for metric in declared:
        if metric.name in found:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(prefix + metric.name, metric.help, labels=(*owner, *metric.labels))
            for sample in found[metric.name]:
                family.add_metric(sample.labels, sample.value)
            yield family


def _of_broker(status: Status | None) -> Iterator[_Sample]:
    values: dict[str, float] = {"broker_up": status is not None}
    if status is not None:
        values |= {
            "broker_uptime_seconds": status.uptime_s,
            "grants_total": status.grants,
            "recalls_total": status.recalls,
            "overdue_recalls_total": status.overdue,
            "refused_messages_total": status.refused_messages,
            "reclaimed_pages_total": status.reclaimed_pages,
        }
    return _samples(values)


def _of_child(child: ChildStatus) -> Iterator[_Sample]:
    return _samples({"ready": child.state == "ready", "restarts_total": child.restarts}, child.name)


def _of_device(device: DeviceStatus) -> Iterator[_Sample]:
    sizes = {"total_bytes": device.total_pages, "free_bytes": device.free_pages, "page_bytes": 1}
    yield from _samples({name: pages * device.page_bytes for name, pages in sizes.items()}, device.device)
    for owner, pages in device.pages_by_owner.items():
        engine, _, use = owner.rpartition("/")
        yield _Sample("held_bytes", (device.device, engine, use), pages * device.page_bytes)


def _of_engine(engine: EngineStatus, status: Status) -> Iterator[_Sample]:
    size = unit_bytes(engine, status)
    sizes = {
        "held_bytes": engine.held_units,
        "busy_bytes": engine.busy_units,
        "waiting_bytes": engine.waiting_units,
        "cached_bytes": engine.cached_units,
        "target_bytes": engine.target_units,
        "floor_bytes": engine.floor_units,
        "share_bytes": engine.share_units,
        "ceiling_bytes": engine.ceiling_units,
        "borrowed_bytes": engine.borrowed_units,
        "lent_bytes": engine.lent_units,
        "recalled_bytes_total": engine.recalled_units,
        "unit_bytes": 1,
    }
    yield from _samples({name: units * size for name, units in sizes.items()}, engine.engine)
    yield _Sample("state", (engine.engine, engine.state), 1)
    for metric in metrics.ENGINE:
        for key, labels in metric.series:
            if key in engine.stats:
                yield _Sample(metric.name, (engine.engine, *labels), engine.stats[key])


def _samples(values: Mapping[str, float], *labels: str) -> Iterator[_Sample]:
    return (_Sample(name, labels, value) for name, value in values.items())


# ---------------------------------------------------------------- joining texts

# Inside a label's value a quote is escaped, so this finds label names only.
_ENGINE_LABEL = re.compile(r'([{,]\s*)engine="')


def merge(texts: Iterable[tuple[str, str]]) -> str:
    """Joins (engine, Prometheus text) pairs. Samples get the engine's label; each family has its HELP and TYPE once.

    Values are not parsed, so they stay as vLLM printed them. vLLM's own `engine` label (the data-parallel rank) becomes
    `exported_engine`, as Prometheus would name it. A text with an empty engine is passed on unchanged.
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
