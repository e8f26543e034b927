"""Says what a bench is doing and how long it has taken: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Reporter", "Stage", "following"]

REFRESH_PER_S = 2  # every refresh costs CPU time that the engines under test would have had
PLAIN_EVERY_S = 20.0


class Stage:
    """One step of a bench while it goes on."""

    def __init__(self, title: str, progress: Progress, say: Callable[[str], None]) -> None:
        """`say`: for plain lines now and then."""
        self._title, self._progress, self._say = title, progress, say
        self._task = progress.add_task(title, total=None)
        self._said_at = time.monotonic()

    def update(self, done: float, total: float) -> None:
        """How far it is, in any unit."""
        self._progress.update(self._task, completed=done, total=total)
        if time.monotonic() - self._said_at >= PLAIN_EVERY_S:
            self._said_at = time.monotonic()
            self._say(f"{self._title}: {100 * done / total:.0f} %" if total else self._title)


class Reporter:
    """Shows the steps on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()

    def note(self, text: str) -> None:
        """One line that stays."""
        since = f"[{time.monotonic() - self._started:4.0f} s]"
        self.console.print(f"{since} {text}", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Shows `title` with the time it takes, until the block ends."""
        started, live = time.monotonic(), self.console.is_terminal
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        shown = Progress(
            *columns, console=self.console, transient=True, refresh_per_second=REFRESH_PER_S, disable=not live
        )
        say = (lambda _: None) if live else self.note
        say(f"{title} ...")
        with shown as progress:
            yield Stage(title, progress, say)
        self.note(f"{title}: done in {time.monotonic() - started:.0f} s")


@asynccontextmanager
async def following(stage: Stage, count: Callable[[], tuple[float, float]]) -> AsyncIterator[None]:
    """Updates the stage from `count` (done, total) twice a second while the block runs."""

    async def follow() -> None:
        while True:
            stage.update(*count())
            await asyncio.sleep(1 / REFRESH_PER_S)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
