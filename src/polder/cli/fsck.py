"""`polder fsck`: checks that every page on some disks is what was written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from polder.cli.options import AsJson
from polder.errors import PolderError
from polder.units import format_bytes

__all__ = ["fsck"]


def fsck(
    directory: Annotated[list[Path], typer.Argument(help="Directories of a disk store that no engine uses now.")],
    repair: Annotated[bool, typer.Option("--repair", help="Drop bad pages, mend index and sizes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check disks of a store: sizes, index, every page. Ends with 3 if a problem is left, or if a directory cannot be
    checked.

    A running store finds bad pages itself and recomputes them. This command is for disks that you do not trust.
    """
    from polder.diskstore.fsck import Report, check_directory, locked, repair_directory

    reports = []
    for path in directory:
        report = Report(directory=str(path), problems=[])
        try:
            with locked(path):
                report, good = check_directory(path)
                if repair and report.problems:
                    repair_directory(path, report, good)
        except PolderError as error:  # other directories are checked and reported nevertheless
            report.problems.append(str(error))
        reports.append(report)
    if as_json:
        print(json.dumps([asdict(report) for report in reports]))
    else:
        for report in reports:
            sizes = f"{format_bytes(report.disk_bytes)} of {format_bytes(report.limit_bytes)}"
            found = f"{report.pages:,} pages in {report.slots:,} slots, {sizes}"
            print(f"{report.directory}: {found if report.slots else 'not checked'}")
            for problem in report.problems:
                print(f"  {'repaired: ' if report.repaired else ''}{problem}")
    if any(report.problems and not report.repaired for report in reports):
        raise typer.Exit(3)
