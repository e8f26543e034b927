"""The host copy of all layers' segments: one memory file, written once, read by every copy to the device.

Engines of the same weights can share it: the one that made it hands its descriptor on, the others open it for reading.
Nobody can shrink it under the others, who would die by SIGBUS. Each process makes its own mapping read-only by
`protect`, and only after the memory is registered with a GPU's driver: the driver pins what it may write to, and
registering read-only memory is an error, or unsupported, on many systems. For the same reason the file is not sealed
against writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from polder.errors import EnvironmentFault, OutOfPages, ProtocolError, UsageError
from polder.memory import _libc
from polder.memory.backend import Backend
from polder.memory.copy import CopyEngine
from polder.stream.pipeline import Pieces
from polder.weights.layout import Block

__all__ = ["HostCopy", "read_out"]


class HostCopy:
    """`layers` segments of `layer_bytes` bytes (a multiple of the system's page). Made by `make` or `open`."""

    def __init__(self, fd: int, layers: int, layer_bytes: int) -> None:
        self._fd: int | None = fd
        self.layers, self.layer_bytes = layers, layer_bytes
        mapping = mmap.mmap(fd, layers * layer_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._rows: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8).reshape(layers, layer_bytes)

    @classmethod
    def make(cls, layers: int, layer_bytes: int, file: int | None = None) -> HostCopy:
        """A new one, zeroed, that takes memory as it is written. Raises EnvironmentFault (OutOfPages) when it cannot be
        made.

        `file`: an empty memory file to make it in, of which this takes a descriptor of its own.
        """
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        fd = os.memfd_create("polder-weights", flags) if file is None else os.dup(file)
        try:
            os.ftruncate(fd, layers * layer_bytes)
            copy = cls(fd, layers, layer_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            os.close(fd)
            what = f"cannot make a host copy of {layers} layers of {layer_bytes} bytes: {error}"
            no_room = error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)
            raise (OutOfPages if no_room else EnvironmentFault)(what) from error
        return copy

    @classmethod
    def open(cls, fd: int, layers: int, layer_bytes: int) -> HostCopy:
        """One that another process made, for reading. The fd stays the caller's to close.

        Raises ProtocolError when it has another size or its maker could still shrink it.
        """
        size = os.fstat(fd).st_size
        if size != layers * layer_bytes:
            raise ProtocolError(f"a host copy of {size} bytes came for {layers} layers of {layer_bytes} bytes")
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:  # no memory file at all
            sealed = 0
        if not sealed:
            raise ProtocolError("a host copy came that can be shrunk by others")
        own = os.dup(fd)
        try:
            copy = cls(own, layers, layer_bytes)
        except BaseException:
            os.close(own)
            raise
        copy._rows.flags.writeable = False
        return copy

    @property
    def fd(self) -> int:
        """To hand on. Stays this object's."""
        if self._fd is None:
            raise EnvironmentFault("the host copy is closed")
        return self._fd

    @property
    def size_bytes(self) -> int:
        return self.layers * self.layer_bytes

    def address(self, layer: int) -> int:
        """The address of the layer's first byte. Layers follow one another: a GPU pins `size_bytes` from `address(0)`
        on."""
        return int(self._rows.ctypes.data) + range(self.layers)[layer] * self.layer_bytes

    def bytes(self, layer: int) -> npt.NDArray[np.uint8]:
        """The layer's segment, shape [layer_bytes], as a view: writable in the copy's maker until `protect`."""
        view: npt.NDArray[np.uint8] = self._rows[layer]
        return view

    def protect(self) -> None:
        """From now on a write through this mapping ends the process (SIGSEGV)."""
        if self._rows.size:
            _libc.make_read_only(self.address(0), self.size_bytes)
            self._rows.flags.writeable = False

    def digest(self) -> str:
        """xxh3 (128 bits, hexadecimal) of all contents."""
        contents: Any = self._rows
        return xxhash.xxh3_128_hexdigest(contents)

    def close(self) -> None:
        """Lets go of the memory, which is free when the last view and every other process have let go too. May be
        repeated."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._rows = np.empty((0, 0), dtype=np.uint8)


def read_out(
    backend: Backend,
    blocks: Sequence[Sequence[Block]],
    layer_bytes: int,
    shared: HostCopy | None,
    file: int | None = None,
) -> HostCopy:
    """A host copy of each layer's blocks, read from where they are now, in `file` if one is given; or `shared`, when it
    has the same bytes.

    Raises UsageError when it has not, OutOfPages when there is no room, EnvironmentFault when the blocks cannot be
    read.
    """
    with contextlib.closing(CopyEngine(backend)) as copies, contextlib.ExitStack() as undo:

        def read(layer: int, address: int) -> None:
            of_layer = [(address + block.offset, block.address, block.size_bytes) for block in blocks[layer]]
            copies.wait(copies.submit(*Pieces.of(of_layer)))

        backend.fence()
        if shared is None:
            host = HostCopy.make(len(blocks), layer_bytes, file)
            undo.callback(host.close)
            for layer in range(len(blocks)):
                read(layer, host.address(layer))
            undo.pop_all()
            return host
        if (shared.layers, shared.layer_bytes) != (len(blocks), layer_bytes):
            raise UsageError("the shared host copy is of a model of another shape")
        scratch = undo.enter_context(contextlib.closing(HostCopy.make(1, layer_bytes)))
        for layer in range(len(blocks)):
            scratch.bytes(0)[:] = 0
            read(layer, scratch.address(0))
            if not np.array_equal(scratch.bytes(0), shared.bytes(layer)):
                raise UsageError(f"the shared host copy has other weights in layer {layer}")
        return shared
