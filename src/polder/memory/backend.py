"""What a device must be able to do for Polder. This file is the manual; `cpu.py` and `cuda.py` carry it out.

The rules are those of the CUDA driver's virtual memory management, and the CPU backend keeps them too, so that what passes its
tests on a laptop passes on a GPU:

* Addresses and physical memory are separate. Addresses are reserved once and stay; pages come and go under them.
* A page that is mapped is accessible at once for this process. Its bytes are whatever its last owner left: zero them.
* Nothing here knows what the device is doing. Before pages are unmapped, the work that uses them must be over: `fence()` for what
  was computed, a wait for each copy. Ranges that are not being changed may be in use all the while.
* **Order on the device.** Launched is not done. Work on a GPU runs in streams, which do not wait for each other. What a thread
  computes runs in one of them, its compute stream (torch's current stream in that thread); each copy queue is another. Three
  calls put them in order, and none of them stops the caller: `mark` names the moment at which all that this thread has launched
  is over; a copy that is submitted `after` a mark starts then; `CopyJob.hold` lets the compute stream wait for a copy. On the
  CPU what was launched is done, so `mark` returns None, and `hold` waits.
* Every method may be called from any thread. Calls on disjoint addresses and handles may run at the same time; two calls
  on the same ones at the same time are the caller's bug.
* Errors are polder.errors: OutOfPages (no memory now), IntegrityError (a rule above was broken, nothing changed) and
  EnvironmentFault (the operating system or the driver refused; the message has its name for it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from polder.memory.page import Handle

__all__ = ["Backend", "CopyJob", "CopyQueue", "Mark", "Stall"]

Stall = Callable[[], float | None]
"""How many seconds the compute stream stood still for a copy; None as long as that is not known."""


class Mark(Protocol):
    """The moment at which all that a thread had launched on its compute stream is over. Made by `Backend.mark`.

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
        """Blocks until the bytes are at their destination (or never will be); returns the seconds the copying itself took.

        Raises the copy's error, the same one at every call. Several threads may wait at the same time.
        """

    def hold(self) -> Stall | None:
        """What the calling thread launches from now on starts when the bytes are at their destination.

        On a GPU returns at once; the result tells later how long the compute stream waited. On the CPU it waits, as `wait` does,
        and returns None. Raises the error of the submission; a copy that fails later spoils the device's context, so that all
        work after it fails too. Raises EnvironmentFault while the compute stream is being captured into a graph, which would
        not repeat the copy.
        """


class CopyQueue(Protocol):
    """A FIFO of copies on one device: a job starts when the job before it has ended. Made by `Backend.copy_queue`."""

    def put(self, dst: Sequence[int], src: Sequence[int], length: Sequence[int], after: Mark | None = None) -> CopyJob:
        """Enqueues copies of `length[i]` bytes from address `src[i]` to `dst[i]`, for all i.

        The job starts when the mark `after` is reached, and so do all jobs behind it. Never raises: errors belong to the job.
        """

    def close(self) -> None:
        """Waits for all jobs, then stops the thread or destroys the stream."""


class Backend(Protocol):
    """Addresses and physical pages of one device, for one process."""

    device: str
    """As the broker names it: "cpu:0", "cuda:1". Tensors over this backend's addresses are on this device."""
    page_bytes: int
    sparse: bool
    """True: `create` takes no physical memory; a page takes it when first mapped or touched."""

    def reserve(self, size_bytes: int) -> int:
        """Returns the first of `size_bytes` (a multiple of the page) unmapped addresses, aligned to 2 MiB.

        They are the caller's until `free`; no other allocation lands there. An access faults: SIGSEGV on the CPU, a sticky
        illegal-address error (Xid 31) on CUDA. Raises OutOfPages when the address space has no such gap.
        """

    def free(self, address: int, size_bytes: int) -> None:
        """Ends a reservation, given exactly as `reserve` was. Raises when it is no reservation or pages are still mapped in it.

        The caller answers for tensors over these addresses: others' memory may appear there afterwards.
        """

    def create(self, count: int) -> list[Handle]:
        """Makes `count` new pages, zeroed on the CPU, of unknown content on CUDA; all can be exported.

        They live until destroyed AND unmapped everywhere. Raises OutOfPages having taken nothing.
        """

    def destroy(self, handles: Sequence[Handle]) -> None:
        """Gives the physical memory of pages back and forgets the handles, which this process must have unmapped.

        CPU: for everybody: other processes that map the page read zeroes from now on, so only the page's owner may call this.
        CUDA: the memory returns when the last handle and mapping, in whatever process, is gone.
        """

    def drop(self, handles: Sequence[Handle]) -> None:
        """Forgets handles and leaves the memory to those who still map or hold it; on CUDA that is what `destroy` does."""

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        """Puts the pages under adjacent addresses, the first at `address`, and makes them accessible.

        The addresses must be reserved, page-aligned and unmapped. One access grant (CUDA), one mmap per stretch of neighbours in
        a segment (CPU) for the whole call. When anything fails, all that this call had mapped is unmapped again, then the
        error is raised: OutOfPages where the device had no memory for it.
        """

    def unmap(self, address: int, count: int) -> None:
        """Takes `count` adjacent pages away in one call. All must be mapped, else it raises and nothing has changed.

        No device work may still use them, see `fence`. The handles and the bytes live on.
        """

    def zero(self, address: int, size_bytes: int) -> None:
        """Fills mapped memory with zero bytes; returns when they are there. Releases the GIL."""

    def export_many(self, handles: Sequence[Handle]) -> tuple[list[int], list[int], list[int]]:
        """(fds, fd_index, offsets), by which another process can adopt the pages: page i is `fds[fd_index[i]]` at `offsets[i]`.

        One fd a segment (CPU) or a page (CUDA), new, close-on-exec, and the caller's to close. Raises with none left open.
        """

    def adopt_many(self, fds: Sequence[int], fd_index: Sequence[int], offsets: Sequence[int]) -> list[Handle]:
        """Handles of pages that another process exported. The fds stay the caller's to close, at once if it likes.

        Raises ProtocolError, having adopted nothing, when the lists do not fit together.

        However often pages of one segment are adopted, the CPU backend keeps one descriptor of it.
        """

    def mark(self) -> Mark | None:
        """The moment at which all that the calling thread has launched on its compute stream is over. None: it is over already.

        Work that other streams do counts where the compute stream was made to wait for it. Copies of copy queues do not count.
        Raises EnvironmentFault while the stream is being captured into a graph, and when the device has failed.
        """

    def fence(self) -> None:
        """Returns when that moment is past: `mark` and `Mark.wait` in one. Nothing to do on the CPU.

        It does not wait for copy queues. Whoever unmaps pages waits for the copies that use them as well.
        """

    def pin(self, address: int, size_bytes: int) -> None:
        """Makes ordinary memory of this process, whole pages of the system, accessible to the device's copy engine at the link's
        full speed. The memory must be writable now; it may be made read-only afterwards. Nothing to do on the CPU. Raises
        EnvironmentFault when the driver refuses: then copies work, through buffers of the driver, and keep their caller waiting.
        """

    def unpin(self, address: int) -> None:
        """Ends that, before the memory is unmapped. `address`: as it was pinned."""

    def copy_queue(self, inline_bytes: int = 0) -> CopyQueue:
        """A new queue of copies between addresses that this device can reach. The caller closes it.

        Up to `inline_bytes` may be copied by `put` itself, when nothing is under way: for callers to whom a copy's delay matters
        more than their own time. Devices with a copy engine take no notice.
        """

    def resident_bytes(self) -> int:
        """Physical memory behind the handles held here, in bytes. Pages shared with other processes are counted by each."""

    def free_bytes(self) -> int | None:
        """Memory of the device that nobody uses, for all processes. None when it is not known, as on the CPU."""

    def close(self) -> None:
        """Forgets all handles and closes their descriptors. Reservations and mappings stay: tensors may live over them."""
