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

    def __init__(self, show: Callable[[float, float], None]) -> None:
        self._show = show

    def update(self, done: float, total: float) -> None:
        """How far it is, in any unit."""
        self._show(done, total)


class Reporter:
    """Shows the steps on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Shows `title` with the time it takes, until the block ends."""
        started = time.monotonic()
        with (self._live if self._console.is_terminal else self._plain)(title) as stage:
            yield stage
        self.note(f"{title}: done in {time.monotonic() - started:.0f} s")

    def note(self, text: str) -> None:
        """One line that stays."""
        since = f"[{time.monotonic() - self._started:4.0f} s]"
        self._console.print(f"{since} {text}", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _live(self, title: str) -> Iterator[Stage]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, refresh_per_second=REFRESH_PER_S) as progress:
            task = progress.add_task(title, total=None)
            yield Stage(lambda done, total: progress.update(task, completed=done, total=total))

    @contextmanager
    def _plain(self, title: str) -> Iterator[Stage]:
        said_at = time.monotonic()

        def show(done: float, total: float) -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= PLAIN_EVERY_S:
                said_at = time.monotonic()
                self.note(f"{title}: {100 * done / total:.0f} %" if total else title)

        self.note(f"{title} ...")
        yield Stage(show)


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
        await asyncio.gather(task, return_exceptions=True)
