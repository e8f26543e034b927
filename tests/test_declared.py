"""Metrics and settings are declared once: what code emits, what docs say and what is declared agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polder import metrics
from polder.broker.config import BROKER_SETTINGS
from polder.engines.vllm.settings import engine_settings
from polder.errors import IntegrityError
from polder.serve.schema import MemoryTable, ModelTable, ServerTable
from polder.settings import declared
from polder.tiers.counters import TierCounters
from scripts.generate_docs import DOCS, generated

SOURCES = Path(metrics.__file__).parent
EMITTING = ("engines", "tiers", "window", "weights", "stream", "diskstore")
_NAMED = re.compile(r"\b(vllm:)?polder_((?:engine|device|child|broker|tier|disk)_[a-z0-9_]+\b)(?!\*)")


def test_generated_parts_of_the_docs_are_up_to_date() -> None:
    for path in DOCS.glob("*.md"):
        assert path.read_text() == generated(path.read_text()), f"{path.name}: run python scripts/generate_docs.py"


def test_each_metric_named_in_the_docs_is_declared() -> None:
    declared = {f"polder_{metric.name}" for metric in metrics.BROKER}
    declared |= {f"polder_child_{metric.name}" for metric in metrics.CHILD}
    declared |= {f"polder_device_{metric.name}" for metric in metrics.DEVICE}
    declared |= {f"polder_engine_{m.name}" for m in (*metrics.STATUS, metrics.GIVEBACK, *metrics.ENGINE)}
    declared |= {f"vllm:polder_{metric.name}" for metric in (*metrics.TIERS, *metrics.DISKS)}
    for path in (*(p for p in DOCS.glob("*.md") if p.name != "log.md"), DOCS.parent / "README.md"):
        named = {f"{vllm}polder_{name}" for vllm, name in _NAMED.findall(path.read_text())}
        assert named <= declared, path


def test_names_say_unit_and_kind() -> None:
    groups = (metrics.ENGINE, metrics.STATUS, metrics.DEVICE, metrics.BROKER, metrics.CHILD)
    for metric in (metric for group in groups for metric in group):
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric
        words = metric.name.removesuffix("_total").split("_")
        if metric.unit in ("bytes", "seconds", "ratio"):
            assert metric.unit in words, metric


def test_a_metrics_meaning_can_be_read_without_that_of_its_neighbour() -> None:
    """Prometheus shows each alone."""
    for metric in (*metrics.ENGINE, *metrics.STATUS, *metrics.DEVICE, *metrics.BROKER, *metrics.CHILD):
        assert not re.search(r"\b(of (these|it)|these (copies|waits)|the same)\b", metric.help, re.IGNORECASE), metric


def test_no_metric_is_declared_twice() -> None:
    for group in ((*metrics.STATUS, *metrics.ENGINE), metrics.DEVICE, metrics.BROKER, metrics.CHILD):
        names = [metric.name for metric in group]
        assert len(names) == len(set(names))


def test_each_declared_metric_is_emitted_somewhere() -> None:
    """Those that read metrics, such as `polder top`, name them, too: only what measures counts here."""
    sources = "".join(path.read_text() for name in EMITTING for path in (SOURCES / name).rglob("*.py"))
    of_tiers = TierCounters(metrics.TIER_NAMES).stats()
    for metric in metrics.ENGINE:
        literal = re.sub(r"\{\w+\}_", "{*}_", metric.key)
        written = re.sub(r"\{[^}\"]+\}_", "{*}_", sources)
        assert f'"{literal}"' in written or {key for key, _ in metric.series} <= of_tiers.keys(), metric.key


def test_each_counter_in_the_code_is_declared() -> None:
    """What an engine emits is checked when it runs (`metrics.checked`); this finds a missing declaration without one."""
    declared = {key for metric in metrics.ENGINE for key, _ in metric.series}
    declared |= {metric.name for group in (metrics.BROKER, metrics.STATUS, metrics.CHILD) for metric in group}
    for path in SOURCES.rglob("*.py"):
        if path.is_relative_to(SOURCES / "bench") or path.name == "metrics.py":
            continue
        named = set(re.findall(r'"([a-z][a-z_0-9]+_total)"', path.read_text()))
        assert named <= declared, path


def test_a_metric_that_is_not_declared_is_refused() -> None:
    assert metrics.checked({"steps_total": 3.0, "tier_host_used_bytes": 1.0}) == {
        "steps_total": 3.0,
        "tier_host_used_bytes": 1.0,
    }
    with pytest.raises(IntegrityError, match="stepz_total"):
        metrics.checked({"stepz_total": 3.0})
    with pytest.raises(KeyError):
        metrics.zeros(metrics.CORE)["stepz_total"] += 1


def test_each_variable_that_the_code_reads_is_a_declared_setting() -> None:
    sources = (path.read_text() for path in SOURCES.rglob("*.py") if path.parent.name != "testing")
    read = {name for text in sources for name in re.findall(r"\bPOLDER_[A-Z_]+[A-Z]\b", text)}
    assert read <= {given.variable for given in engine_settings()}
    assert len({given.key for given in engine_settings()}) == len(engine_settings())


def test_each_setting_is_used() -> None:
    sources = "".join(path.read_text() for path in SOURCES.rglob("*.py"))
    for given in (*engine_settings(), *BROKER_SETTINGS.values(), *declared(ServerTable, MemoryTable, ModelTable)):
        assert f".{given.field}" in sources, given.key
