"""The contract between Polder and the memory of a device. `cpu.py` and `cuda.py` implement it.

The rules are those of the CUDA driver's virtual memory management. The CPU backend keeps them too, so code that passes
its tests there behaves the same on a GPU:

* Addresses and physical memory are separate. Addresses are reserved once and stay; pages are mapped and unmapped.
* A mapped page is accessible at once for this process. Its bytes are those of its last owner: zero them.
* The backend does not know what the device is doing. Before pages are unmapped, the work that uses them must be over:
  `fence()` for computing, a wait for each copy. Other ranges may be in use meanwhile.
* **Order on the device.** Work on a GPU is launched into streams, which do not wait for each other. What a thread
  computes runs in one of them, its compute stream (torch's current stream in that thread); each copy queue is another.
  Three calls order them, and none blocks the caller: `mark` names the moment at which all work that this thread has
  launched is over; a copy that is submitted `after` a mark starts then; `CopyJob.hold` lets the compute stream wait for
  a copy. On the CPU launched work is over, so `mark` returns None, and `hold` waits.
* Any thread may call any method. Calls on disjoint addresses and handles may run at the same time; two simultaneous
  calls on the same ones are an error of the caller that is not detected.
* Errors are polder.errors: OutOfPages (no memory now), IntegrityError (a rule above was broken, nothing changed) and
  EnvironmentFault (the operating system or the driver refused; the message has its name of the error).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from polder.memory.page import Handle, Mask

__all__ = ["Backend", "CopyJob", "CopyQueue", "Dropped", "Mark", "Stall"]

Dropped = deque[tuple["Backend", int, Mask]]
"""Reservations whose users are gone: backend, first address, which page slots are still mapped."""

Stall = Callable[[], float | None]
"""Seconds for which the compute stream waited for a copy; None as long as that is not known."""


class Mark(Protocol):
    """The moment at which all work that a thread had launched on its compute stream is over. Made by `Backend.mark`.

    Any thread may use it, any number of times. An error of the device is raised as EnvironmentFault.
    """

    def done(self) -> bool:
        """True once the moment is past. Never blocks."""

    def wait(self) -> None:
        """Blocks the calling thread until then, without using a core."""


class CopyJob(Protocol):
    """One submission to a CopyQueue."""

    def done(self) -> bool:
        """True once `wait` would return at once. Never blocks."""

    def wait(self) -> float:
        """Blocks until the copy has ended. Returns the seconds that the copying itself took.

        Raises the copy's error, the same one at every call. Several threads may wait at the same time.
        """

    def hold(self) -> Stall | None:
        """Work that the calling thread launches from now on starts after this copy.

        On a GPU it returns at once; the result tells later how long the compute stream waited. On the CPU it waits, as
        `wait` does, and returns None. Raises the error of the submission. A copy that fails later corrupts the device's
        context, so that all work after it fails too. Raises EnvironmentFault while the compute stream is captured into
        a graph, which would not repeat the copy.
        """


class CopyQueue(Protocol):
    """A FIFO of copies on one device: a job starts when the job before it has ended. Made by `Backend.copy_queue`."""

    def put(self, dst: Sequence[int], src: Sequence[int], length: Sequence[int], after: Mark | None = None) -> CopyJob:
        """Enqueues copies of `length[i]` bytes from address `src[i]` to `dst[i]`.

        The job starts when the mark `after` is reached, and so do all jobs behind it. Never raises: errors belong to
        the job.
        """

    def close(self) -> None:
        """Waits for all jobs, then stops the thread or destroys the stream."""


class Backend(Protocol):
    """Addresses and physical pages of one device, for one process."""

    device: str
    """The broker's name of it: "cpu:0", "cuda:1". Tensors over this backend's addresses are on this device."""
    page_bytes: int
    sparse: bool
    """True: `create` takes no physical memory. A page takes it when it is first mapped or touched."""
    dropped: Dropped
    """For the spans of this backend, which free what lies here. Finalizers append to it, at any moment."""

    def reserve(self, size_bytes: int) -> int:
        """Reserves `size_bytes` addresses (a multiple of the page size), aligned to 2 MiB. Returns the first.

        They belong to the caller until `free`; no other allocation gets them. An access faults: SIGSEGV on the CPU, a
        sticky illegal-address error (Xid 31) on CUDA. Raises OutOfPages when the address space has no such gap.
        """

    def free(self, address: int, size_bytes: int) -> None:
        """Ends a reservation. The arguments must be those of `reserve`. Raises for other ones, and when pages are
        mapped in it.

        No tensor over these addresses may be used afterwards: other memory may be mapped there.
        """

    def create(self, count: int) -> list[Handle]:
        """Makes `count` new pages, which can be exported. They are zeroed on the CPU, of unknown content on CUDA.

        They live until they are destroyed and unmapped in all processes. Raises OutOfPages, with none made.
        """

    def destroy(self, handles: Sequence[Handle]) -> None:
        """Releases the physical memory of pages and forgets the handles. This process must have unmapped them.

        CPU: other processes that map the page read zeroes from now on, so only the page's owner may call this. CUDA:
        the memory is released with the last handle and mapping in any process.
        """

    def drop(self, handles: Sequence[Handle]) -> None:
        """Forgets handles and leaves the memory to processes that map or hold it. On CUDA the same as `destroy`."""

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        """Maps the pages at adjacent addresses, the first at `address`, and makes them accessible.

        The addresses must be reserved, page-aligned and unmapped. One call grants access to all pages (CUDA), one mmap
        maps a run of neighbours in a segment (CPU). After an error nothing of this call is mapped. Raises OutOfPages
        when the device has no memory for it.
        """

    def unmap(self, address: int, count: int) -> None:
        """Unmaps `count` adjacent pages in one call. All must be mapped; otherwise it raises and nothing has changed.

        No work of the device may still use them, see `fence`. The handles and the bytes stay.
        """

    def zero(self, address: int, size_bytes: int) -> None:
        """Fills mapped memory with zero bytes; returns when they are written. Releases the GIL."""

    def export_many(self, handles: Sequence[Handle]) -> tuple[list[int], list[int], list[int]]:
        """(fds, fd_index, offsets), by which another process can adopt the pages: page i is `fds[fd_index[i]]` at
        `offsets[i]`.

        One fd a segment (CPU) or a page (CUDA), new, close-on-exec, and the caller's to close. Raises with none left
        open.
        """

    def adopt_many(self, fds: Sequence[int], fd_index: Sequence[int], offsets: Sequence[int]) -> list[Handle]:
        """Handles of pages that another process exported. The fds stay the caller's to close, at once if it likes.

        Raises ProtocolError, having adopted nothing, when the lists do not fit together.

        However often pages of one segment are adopted, the CPU backend keeps one descriptor of it.
        """

    def mark(self) -> Mark | None:
        """The moment at which all work that the calling thread has launched on its compute stream is over. None: it is
        over.

        Work of other streams counts if the compute stream was made to wait for it. Copies of copy queues do not count.
        Raises EnvironmentFault while the stream is captured into a graph, and when the device has failed.
        """

    def fence(self) -> None:
        """Returns when that moment is past: `mark` and `Mark.wait` in one call. Does nothing on the CPU.

        It does not wait for copy queues. Before pages are unmapped, the copies that use them must be waited for as
        well.
        """

    def pin(self, address: int, size_bytes: int) -> None:
        """Makes memory of this process (whole pages of the system) accessible to the device's copy engine at full
        speed.

        It must be writable now and may be made read-only afterwards. Does nothing on the CPU. Raises EnvironmentFault
        when the driver refuses; copies work nevertheless, through buffers of the driver, and block their caller.
        """

    def unpin(self, address: int) -> None:
        """Ends that. To be called before the memory is unmapped, with the address that was pinned."""

    def copy_queue(self, inline_bytes: int = 0) -> CopyQueue:
        """A new queue of copies between addresses that this device can reach. The caller closes it.

        Up to `inline_bytes` bytes may be copied by `put` itself when the queue is empty, for callers to whom a copy's
        delay matters more than their own time. Backends with a copy engine ignore it.
        """

    def resident_bytes(self) -> int:
        """Physical memory behind the handles held here, in bytes. Pages shared with other processes are counted by
        each."""

    def free_bytes(self) -> int | None:
        """Free memory of the device, all processes considered. None when it is not known, as on the CPU."""

    def close(self) -> None:
        """Forgets all handles and closes their descriptors. Reservations and mappings stay, for tensors over them."""
