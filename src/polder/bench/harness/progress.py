"""Says what a bench is doing and how long it has taken: live lines on a terminal, plain lines anywhere else."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Reporter", "Stage", "reporter_for"]

REFRESH_PER_S = 2  # every refresh costs CPU time that the engines under test would have had
PLAIN_EVERY_S = 20.0


class Stage(ABC):
    """One step of a bench while it goes on."""

    @abstractmethod
    def update(self, done: float, total: float) -> None:
        """How far it is, in any unit."""


class Reporter(ABC):
    """Where the steps are shown."""

    @abstractmethod
    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Shows `title` with the time it takes, until the block ends."""

    @abstractmethod
    def note(self, text: str) -> None:
        """One line that stays."""


def reporter_for(console: Console) -> Reporter:
    return _Live(console) if console.is_terminal else _Plain(console)


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


class _LiveStage(Stage):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: float, total: float) -> None:
        self._progress.update(self._task, completed=done, total=total)


class _Live(Reporter):
    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        started = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, refresh_per_second=REFRESH_PER_S) as progress:
            yield _LiveStage(progress, progress.add_task(title, total=None))
        self._console.print(f"[green]✓[/] {title} [dim]{time.monotonic() - started:.0f} s[/]", highlight=False)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False)


class _PlainStage(Stage):
    def __init__(self, title: str, say: Callable[[str], None]) -> None:
        self._title = title
        self._say = say
        self._said_at = time.monotonic()

    def update(self, done: float, total: float) -> None:
        if time.monotonic() - self._said_at >= PLAIN_EVERY_S:
            self._said_at = time.monotonic()
            self._say(f"{self._title}: {100 * done / total:.0f} %" if total else self._title)


class _Plain(Reporter):
    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        started = time.monotonic()
        self.note(f"{title} ...")
        yield _PlainStage(title, self.note)
        self.note(f"{title}: done in {time.monotonic() - started:.0f} s")

    def note(self, text: str) -> None:
        self._console.print(
            f"[{time.monotonic() - self._started:4.0f} s] {text}", highlight=False, markup=False, soft_wrap=True
        )
