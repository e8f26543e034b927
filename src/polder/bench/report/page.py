"""One HTML page that needs no other file: tiles, checks, plots, tables and the conditions of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jinja2
import msgspec

from polder.bench.report.limits import Verdict
from polder.bench.report.tables import Table

__all__ = ["Plot", "render_page"]


class Plot(NamedTuple):
    title: str
    text: str
    svg: str
    """The <svg> element."""


def render_page(
    *,
    title: str,
    subtitle: str,
    line: str,
    conditions: Mapping[str, Any],
    tiles: Iterable[tuple[str, str]] = (),
    checks: Iterable[Verdict] = (),
    plots: Iterable[Plot] = (),
    tables: Iterable[Table] = (),
) -> str:
    """`tiles`: the figures that matter, with what they are. `line`: of the conditions, what always has to be seen."""
    environment = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("polder.bench", "data"))
    return environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        line=line,
        tiles=list(tiles),
        checks=list(checks),
        plots=list(plots),
        tables=list(tables),
        conditions=msgspec.json.format(msgspec.json.encode(conditions), indent=2).decode(),
    )
