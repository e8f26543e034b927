"""Host copies of weights that engines share: which file holds whose weights, and who uses it. The engines write and
read the bytes (weights/host_copy.py).

The first process that asks for a key gets an empty file to fill, and reports when it is full. Processes that ask later
get the full file. Until then they get none and make a copy of their own; if the first process dies, the next one that
asks fills a new file. A file is closed here when all processes that got it have ended. Processes that have mapped it
keep its bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

__all__ = ["HostFile", "HostFiles"]


@dataclass(kw_only=True)
class HostFile:
    fd: int
    """Closed by HostFiles."""
    maker: int
    filled: bool = False
    users: set[int] = field(default_factory=set)


class HostFiles:
    """All shared files of one broker."""

    def __init__(self) -> None:
        self._files: dict[str, HostFile] = {}

    def ask(self, key: str, pid: int) -> HostFile | None:
        """The file of `key`, for the process `pid` to read, or to fill if it is new. None while another process fills
        it."""
        file = self._files.get(key)
        if file is None:
            fd = os.memfd_create("polder-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            file = self._files[key] = HostFile(fd=fd, maker=pid)
        elif not file.filled:
            return None
        file.users.add(pid)
        return file

    def filled(self, key: str, pid: int) -> bool:
        """The process has written everything. False if it was not the one to fill this file."""
        file = self._files.get(key)
        if file is None or file.maker != pid:
            return False
        file.filled = True
        return True

    def ended(self, pid: int) -> None:
        for key, file in list(self._files.items()):
            file.users.discard(pid)
            if not file.users:
                os.close(file.fd)
                del self._files[key]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Key -> (bytes, processes that use it)."""
        return {key: (os.fstat(file.fd).st_size, len(file.users)) for key, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()
