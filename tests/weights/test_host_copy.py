"""Host copies: of fixed size, shared for reading, gone when closed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from polder.errors import EnvironmentFault, OutOfPages, ProtocolError, UsageError
from polder.memory.cpu import CpuBackend
from polder.memory.cuda import CudaBackend
from polder.weights.host_copy import HostCopy, read_out
from polder.weights.layout import Block
from tests.memory.machines import FakeCuda

pytestmark = pytest.mark.usefixtures("no_fd_leak")


@pytest.fixture
def made():
    made = HostCopy.make(3, 8192)
    yield made
    made.close()


def test_layers_lie_one_after_another_from_a_page(made: HostCopy) -> None:
    assert made.address(0) % 4096 == 0
    assert [made.address(layer) - made.address(0) for layer in range(3)] == [0, 8192, 16384]
    assert made.size_bytes == 3 * 8192
    made.bytes(1)[:] = 7
    assert ctypes.string_at(made.address(1), 8192) == bytes([7]) * 8192
    assert not made.bytes(0).any()
    assert not made.bytes(2).any()


def test_another_process_reads_the_same_bytes_and_cannot_change_them(made: HostCopy) -> None:
    made.bytes(2)[:] = np.arange(8192, dtype=np.uint64).astype(np.uint8)
    script = f"""
from polder.weights.host_copy import HostCopy
import ctypes
copy = HostCopy.open({made.fd}, 3, 8192)
print(copy.digest(), copy.bytes(0).flags.writeable, flush=True)
copy.protect()
print(copy.digest(), flush=True)
ctypes.memset(copy.address(0), 1, 1)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, pass_fds=[made.fd])
    assert result.stdout.split() == [made.digest(), "False", made.digest()]
    assert result.returncode == -signal.SIGSEGV


def test_nobody_can_change_its_size(made: HostCopy) -> None:
    for size in (8192, 4 * 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(made.fd, size)


def test_the_digest_is_that_of_every_byte(made: HostCopy) -> None:
    before = made.digest()
    made.bytes(2)[8191] = 1
    assert made.digest() != before
    made.bytes(2)[8191] = 0
    assert made.digest() == before


def test_its_memory_lasts_until_the_last_holder_lets_go(made: HostCopy) -> None:
    view = made.bytes(0)
    other = HostCopy.open(made.fd, 3, 8192)
    made.bytes(0)[:] = 5
    made.close()
    made.close()
    with pytest.raises(EnvironmentFault, match="closed"):
        _ = made.fd
    assert (view == 5).all()
    assert (other.bytes(0) == 5).all()
    other.close()


def test_another_size_or_an_unsealed_file_is_refused(made: HostCopy) -> None:
    with pytest.raises(ProtocolError, match="for 4 layers"):
        HostCopy.open(made.fd, 4, 8192)
    loose = os.memfd_create("loose")
    os.ftruncate(loose, 8192)
    with pytest.raises(ProtocolError, match="shrunk"):
        HostCopy.open(loose, 1, 8192)
    os.close(loose)


def test_more_than_there_are_addresses_is_refused() -> None:
    with pytest.raises(OutOfPages, match="cannot make a host copy"):
        HostCopy.make(1 << 20, 1 << 40)  # takes no memory: nothing is written


def test_a_shared_copy_is_compared_byte_by_byte(made: HostCopy) -> None:
    backend = CpuBackend(page_bytes=4096)
    layers = np.random.default_rng(0).integers(0, 255, (3, 5000), np.uint8)
    blocks = [
        [
            Block(address=row.ctypes.data, offset=0, size_bytes=100),
            Block(address=row.ctypes.data + 200, offset=128, size_bytes=4800),
        ]
        for row in layers
    ]
    own = read_out(backend, blocks, 8192, None)
    assert (own.bytes(1)[:100] == layers[1, :100]).all()
    assert (own.bytes(1)[128:4928] == layers[1, 200:]).all()
    shared = HostCopy.open(own.fd, 3, 8192)
    assert read_out(backend, blocks, 8192, shared) is shared
    own.bytes(2)[300] += 1
    with pytest.raises(UsageError, match="other weights in layer 2"):
        read_out(backend, blocks, 8192, shared)
    with pytest.raises(UsageError, match="another shape"):
        read_out(backend, blocks[:2], 8192, shared)
    own.close()
    shared.close()


def test_a_shared_copy_can_be_pinned_and_is_read_only_afterwards(made: HostCopy, fake_cuda: FakeCuda) -> None:
    """The fake driver pins what is writable only, as some systems do."""
    fake_cuda.reset()
    backend, other = CudaBackend(0), HostCopy.open(made.fd, 3, 8192)
    for copy in (made, other):
        backend.pin(copy.address(0), copy.size_bytes)
        copy.protect()
        with pytest.raises(ValueError, match="read-only"):
            copy.bytes(0)[:] = 1
        backend.unpin(copy.address(0))
    other.close()
    backend.close()
