"""Writes the tables of docs/ that are made from declarations: python scripts/generate_docs.py

A generated part of a file stands between two comments, `<!-- generated: NAME -->` and `<!-- end -->`. tests/test_declared.py fails
when a file is not what this script would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from polder import metrics
from polder.metrics import Metric

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


PARTS: dict[str, Callable[[], str]] = {
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
