"""Host copies of weights that engines share: which file has whose, and who uses it. The bytes are the engines'
(weights/host_copy.py).

The first process that asks for a key gets an empty file to fill, and says so when it has; whoever asks later gets the full one.
Meanwhile others get none and make a copy of their own; if it dies before, the next to ask fills one. A file is let go of when all
processes that got it have ended; those that have mapped it keep its bytes whatever becomes of the broker.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

__all__ = ["HostFile", "HostFiles"]


@dataclass(kw_only=True)
class HostFile:
    fd: int
    """The registry's."""
    maker: int
    filled: bool = False
    users: set[int] = field(default_factory=set)


class HostFiles:
    """One broker's."""

    def __init__(self) -> None:
        self._files: dict[str, HostFile] = {}

    def ask(self, key: str, pid: int) -> HostFile | None:
        """The file of `key` for the process `pid`, to fill if it made none before; None while another one fills it."""
        file = self._files.get(key)
        if file is None:
            fd = os.memfd_create("polder-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            file = self._files[key] = HostFile(fd=fd, maker=pid)
        elif not file.filled:
            return None
        file.users.add(pid)
        return file

    def filled(self, key: str, pid: int) -> bool:
        """The maker has written everything. False: it is not the maker."""
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
