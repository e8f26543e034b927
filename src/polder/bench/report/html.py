"""One HTML page that needs no other file: tiles, checks, plots, tables and the conditions of a run (data/report.html)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
import msgspec

__all__ = ["Plot", "render"]


class Plot(NamedTuple):
    title: str
    text: str
    svg: str
    """The <svg> element."""


def render(conditions: Mapping[str, Any], **parts: Any) -> str:
    """`parts`: title, subtitle, line (of the conditions, what always has to be seen), tiles (figure, what it is), checks,
    plots, tables."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.PackageLoader("polder.bench", "data")
    )
    shown = msgspec.json.format(msgspec.json.encode(conditions), indent=2).decode()
    return environment.get_template("report.html").render(conditions=shown, **parts)
