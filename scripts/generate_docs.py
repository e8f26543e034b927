"""Writes the tables of docs/ that are made from declarations: python scripts/generate_docs.py

A generated part of a file stands between two comments, `<!-- generated: NAME -->` and `<!-- end -->`. tests/test_declared.py fails
when a file is not what this script would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from polder import metrics
from polder.broker.config import BROKER_SETTINGS
from polder.engines.vllm import hooks
from polder.engines.vllm.settings import engine_settings
from polder.metrics import Metric
from polder.serve.schema import MemoryTable, ModelTable, ServerTable
from polder.settings import Setting, declared, default_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heading = list(columns)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heading, ["---"] * len(heading), *rows))


def _metrics(prefix: str, group: Iterable[Metric], *owner: str) -> str:
    rows = (
        (
            f"`{prefix}{metric.name}`",
            metric.kind,
            metric.unit,
            ", ".join((*owner, *metric.labels)),
            f"{metric.help}.",
        )
        for metric in group
    )
    return table(("name", "kind", "unit", "labels", "meaning"), rows)


def _engine_metrics() -> str:
    parts = [f"### {title}\n\n{_metrics('polder_engine_', g, 'engine')}" for title, g in metrics.ENGINE_GROUPS.items()]
    return "\n".join(parts)


def _settings(settings: Iterable[Setting], columns: dict[str, Callable[[Setting], str]]) -> str:
    rows = (
        (*(code(name(given)) for name in columns.values()), f"{given.help}.", default_of(given)) for given in settings
    )
    return table((*columns, "meaning", "default"), rows)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


_KEY: dict[str, Callable[[Setting], str]] = {"key": lambda given: given.key}
_ENGINE: dict[str, Callable[[Setting], str]] = {
    "environment": lambda given: given.variable,
    "additional-config": lambda given: given.key,
    "fleet file": lambda given: given.model,
}
_BROKER: dict[str, Callable[[Setting], str]] = {"option": lambda given: given.option} | _KEY
PARTS: dict[str, Callable[[], str]] = {
    "taps": hooks.table,
    "engine-settings": lambda: _settings(engine_settings(), _ENGINE),
    "server-settings": lambda: _settings(declared(ServerTable), _KEY),
    "memory-settings": lambda: _settings(declared(MemoryTable), _KEY),
    "model-settings": lambda: _settings(declared(ModelTable), _KEY),
    "broker-settings": lambda: _settings(BROKER_SETTINGS.values(), _BROKER),
    "engine-metrics": _engine_metrics,
    "status-metrics": lambda: _metrics("polder_engine_", (*metrics.STATUS, metrics.GIVEBACK), "engine"),
    "device-metrics": lambda: _metrics("polder_device_", metrics.DEVICE, "device"),
    "broker-metrics": lambda: _metrics("polder_", metrics.BROKER),
    "child-metrics": lambda: _metrics("polder_child_", metrics.CHILD, "child"),
}


def generated(text: str) -> str:
    """The text with all of its generated parts made anew."""
    return _PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[3]}", text)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        path.write_text(generated(path.read_text()))


if __name__ == "__main__":
    main()
