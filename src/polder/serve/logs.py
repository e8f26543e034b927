"""The log of a child: what of it is said when the child fails, and how long it may get.

The child writes to the file itself. When the file is too long it is copied to NAME.1 and cut, while the child goes on
appending to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["Log", "first_cause", "keep_logs"]

MOST_BYTES = 64 << 20
"""A log, and the one before it, get no longer."""
READ_BYTES = 4 << 20
TAIL_BYTES = 64 << 10
KEPT = 5
"""Fleets whose logs are kept after a failure."""
_REFUSAL = re.compile(r"polder\.errors\.(?:ConfigError|UnsupportedVersion): (.*)")
# vLLM writes "(EngineCore pid=7) ERROR 11-30 10:11:12 [core.py:99] " before each line of a traceback, or a part of it.
_PREFIX = re.compile(r"(?P<who>\([A-Z]\w* pid=\d+\) )?(?:(?:ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] )?")
_CORE_GONE = "vllm.v1.engine.exceptions.EngineDeadError: "
_KILLED = (
    "its engine core ended and left no error, as a process does that is killed: by hand, or by the kernel for memory, "
    "which `dmesg` would show"
)
_USAGE = re.compile(r"[\w .-]+: error: .+")


def first_cause(text: str) -> str:
    """The first error in a log: a parser's refusal, or the exception of the first traceback. Empty if there is none.

    That the front end lost its core is an answer only if the core has no traceback.
    """
    core_is_gone = False
    writer: str | None = None  # of the traceback that is being read
    lines = [(found["who"] or "", line[found.end() :]) for line in text.splitlines() if (found := _PREFIX.match(line))]
    for at, (who, words) in enumerate(lines):
        if writer is None and _USAGE.fullmatch(words):
            return words
        if writer is None and words.startswith("Traceback (most recent call last)"):
            writer = who
        elif writer == who and words.startswith(_CORE_GONE):
            writer, core_is_gone = None, True
        elif writer == who and words and not words[0].isspace():
            more = (line.strip() for other, line in lines[at + 1 : at + 4] if other == who and line[:1].isspace())
            return " ".join((words, *more))
    return _KILLED if core_is_gone else ""


class Log:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._from = 0  # bytes of the log before this start

    def begin(self) -> BinaryIO:
        """The file for a child that is about to start."""
        self.shorten()
        file = self.path.open("ab")
        self._from = file.tell()
        return file

    def shorten(self) -> None:
        """Cuts the log if it is too long. What is written in that moment is lost."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size > MOST_BYTES:
                shutil.copyfile(self.path, self.path.with_name(f"{self.path.name}.1"))
                os.truncate(self.path, 0)
                self._from = 0

    def tail(self, lines: int = 15) -> list[str]:
        """The last lines of this start."""
        return self._read(TAIL_BYTES).splitlines()[-lines:]

    def failure(self) -> str:
        """Why the child ended, as the end of an error message: the first cause, else the log's last lines."""
        cause = first_cause(self._read())
        if cause:
            return f": {cause} (log: {self.path})"
        return f". The end of {self.path}:\n" + "\n".join(self.tail())

    def refusal(self) -> str:
        """Polder's own error in the log, which would come again after a restart. Empty if there is none."""
        found = _REFUSAL.search(self._read())
        return found[1].strip() if found else ""

    def _read(self, last_bytes: int = MOST_BYTES) -> str:
        """What this start has written, the last bytes of it."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._from, self.path.stat().st_size - last_bytes))
                return file.read(READ_BYTES).decode(errors="replace")
        except OSError:
            return ""


def keep_logs(folder: Path) -> Path:
    """Copies the logs out of a directory that is about to be removed. Returns where they are, the directory itself when
    they cannot be copied. The oldest such copies go.
    """
    state = os.environ.get("XDG_STATE_HOME") or f"{os.environ.get('HOME', '/tmp')}/.local/state"
    parent = Path(state) / "polder"
    kept = parent / f"logs-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        kept.mkdir(mode=0o700, parents=True)
        for path in _logs_in(folder):
            shutil.copyfile(path, kept / path.name)
        for old in sorted(parent.glob("logs-*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return folder
    return kept


def _logs_in(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.log")
    yield from folder.glob("*.log.1")
