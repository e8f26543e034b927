"""Where a fleet keeps its socket and logs while it runs, and how other commands find it.

    $XDG_RUNTIME_DIR/polder/        or /tmp/polder-UID/ without that variable; mode 0700, owned by the user
        f8x2k1qa/                   one for each fleet, locked (flock) by its `polder serve` while that lives
            broker.sock
            chat.log ...

A killed fleet cannot remove its directory. The next one does, because a directory whose lock is free has no owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from polder.errors import EnvironmentFault

__all__ = ["SOCKET_NAME", "discover_sockets", "remake", "runtime_dir", "user_dir"]

SOCKET_NAME = "broker.sock"
_PREFIX = "f"


def user_dir() -> Path:
    """The directory of this user's fleets. It may not exist."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "polder" if base else Path("/tmp") / f"polder-{os.getuid()}"


@contextlib.contextmanager
def runtime_dir() -> Iterator[Path]:
    """A private directory of this fleet, removed at the end. Raises EnvironmentFault when none can be made."""
    parent = user_dir()
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        owned = parent.lstat()
        if not stat.S_ISDIR(owned.st_mode) or owned.st_uid != os.getuid() or stat.S_IMODE(owned.st_mode) & 0o077:
            raise EnvironmentFault(
                f"{parent} must be a directory of yours with mode 0700: remove it, or set XDG_RUNTIME_DIR"
            )
        with _locked(parent):
            _sweep(parent)
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            lock = _lock(path)
    except OSError as error:
        raise EnvironmentFault(f"cannot make a directory for the fleet in {parent}: {error.strerror}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        with contextlib.suppress(OSError):
            parent.rmdir()  # only if no other fleet runs


def remake(path: Path) -> None:
    """Makes a fleet's directory again if something has removed it: a cleaner of /tmp, or the end of a login session.

    Its lock is held until this process ends. Raises EnvironmentFault when the directory cannot be made.
    """
    if path.is_dir():
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            path.mkdir(mode=0o700, exist_ok=True)
            _lock(path)
    except OSError as error:
        raise EnvironmentFault(
            f"{path} was removed and cannot be made again ({error.strerror}): set XDG_RUNTIME_DIR to a directory that stays"
        ) from error


def discover_sockets() -> list[Path]:
    """The brokers' sockets of this user's fleets, the most recent first."""
    found = [(path.stat().st_mtime, path) for path in user_dir().glob(f"{_PREFIX}*/{SOCKET_NAME}") if path.exists()]
    return [path for _, path in sorted(found, reverse=True)]


def _sweep(parent: Path) -> None:
    """Removes what killed fleets left. Called under the parent's lock, so a directory without a lock has no owner."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _lock(path)
    try:
        yield
    finally:
        os.close(lock)


def _lock(path: Path) -> int:
    """The descriptor that holds the directory's lock until it is closed."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock
