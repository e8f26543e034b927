"""Tables and checks of a bench's report, for the terminal and for HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import NamedTuple

import rich.table
from rich.console import Console

from polder.bench.checks import Check
from polder.bench.report.metrics import Metric

__all__ = ["Table", "cell", "html_checks", "html_table", "print_checks", "print_tables"]


class Table(NamedTuple):
    title: str
    columns: list[str]
    """Headings of all columns but the first, which has none."""
    rows: list[list[str]]


def cell(value: Metric | None, ratio: float | None = None) -> str:
    """A figure as it stands in a table, with its ratio to a baseline's; empty when there is none."""
    if value is None or isinstance(value, dict):
        return ""
    digits = 0 if value == int(value) or abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}" + (f" (x{ratio:.2f})" if ratio is not None else "")


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    for title, columns, rows in tables:
        table = rich.table.Table(title=title, title_justify="left", header_style="bold")
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """Passed and missed alike."""
    for check in checks:
        mark = "[green]ok    [/]" if check.passed else "[bold red]MISSED[/]"
        console.print(f"{mark} {check.name}: {check.detail}", highlight=False, soft_wrap=True)


def html_checks(checks: Iterable[Check]) -> str:
    rows = "".join(
        f"<tr><td class='{'yes' if c.passed else 'no'}'>{'met' if c.passed else 'missed'}</td>"
        f"<td class='text'><code>{escape(c.name)}</code></td><td class='text'>{escape(c.detail)}</td></tr>"
        for c in checks
    )
    return f"<section><h2>Checks</h2><div class='scroll'><table>{rows}</table></div></section>"


def html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in ("", *table.columns))
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in table.rows)
    text = f"<table><tr>{head}</tr>{body}</table>"
    return f"<section><h2>{escape(table.title)}</h2><div class='scroll'>{text}</div></section>"
