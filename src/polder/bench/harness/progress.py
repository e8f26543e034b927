"""Says what a bench is doing and how long it has taken: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Reporter", "Update"]

REFRESH_PER_S = 2  # every refresh costs CPU time that the engines under test would have had
PLAIN_EVERY_S = 20.0

Update = Callable[[float, float], None]
"""(done, total): how far a stage is, in any unit."""


class Reporter:
    """Shows the stages on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage_seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def note(self, text: str) -> None:
        """One line that stays."""
        since = f"[{time.monotonic() - self._started:4.0f} s]"
        self.console.print(f"{since} {text}", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Shows `title` with the time it takes, until the block ends."""
        started = said_at = time.monotonic()
        live = self.console.is_terminal
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        shown = {"transient": True, "refresh_per_second": REFRESH_PER_S, "disable": not live}
        if not live:
            self.note(f"{title} ...")
        with Progress(*columns, console=self.console, **shown) as progress:  # type: ignore[arg-type]
            task = progress.add_task(title, total=None)

            def update(done: float, total: float) -> None:
                nonlocal said_at
                progress.update(task, completed=done, total=total)
                if not live and total and time.monotonic() - said_at >= PLAIN_EVERY_S:
                    said_at = time.monotonic()
                    self.note(f"{title}: {100 * done / total:.0f} %")

            yield update
        seconds = time.monotonic() - started
        self.stage_seconds[title] = round(seconds, 1)
        self.note(f"{title}: done in {seconds:.0f} s")
