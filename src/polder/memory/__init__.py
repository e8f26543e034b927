"""Physical pages, reserved addresses and everything that moves between them, for one process and one device.

A backend (`CpuBackend`, or `CudaBackend` from polder.memory.cuda) reserves addresses and makes pages. The broker owns a device's
pages by number (`PagePool`) and hands them out as file descriptors (`send_fds`, `recv_fds`); an engine's worker adopts them
(`ImportedPages`), maps them at the slots of its `Span`, over which it has made its tensors once and for all, and moves blocks
with a `CopyEngine`. Nothing here decides who gets what: that is the broker's part. polder.memory.backend is the manual.
"""

from polder.memory.backend import Backend, CopyJob, CopyQueue
from polder.memory.copy import CopyEngine, CopyStatistics
from polder.memory.cpu import CpuBackend
from polder.memory.handoff import recv_fds, send_fds
from polder.memory.page import PAGE_BYTES, Handle, runs
from polder.memory.pool import ImportedPages, ImportedStatistics, PagePool, PoolStatistics
from polder.memory.span import Span, SpanStatistics
from polder.memory.tensor import tensor_over

__all__ = [
    "PAGE_BYTES",
    "Backend",
    "CopyEngine",
    "CopyJob",
    "CopyQueue",
    "CopyStatistics",
    "CpuBackend",
    "Handle",
    "ImportedPages",
    "ImportedStatistics",
    "PagePool",
    "PoolStatistics",
    "Span",
    "SpanStatistics",
    "recv_fds",
    "runs",
    "send_fds",
    "tensor_over",
]
