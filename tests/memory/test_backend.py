"""The rules of polder.memory.backend, on every kind of device."""

from __future__ import annotations

import gc
import mmap
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from polder.errors import ConfigError, EnvironmentFault, IntegrityError, OutOfPages, PolderError, ProtocolError
from polder.memory import _libc, cuda
from polder.memory.cpu import CpuBackend
from polder.memory.cuda import CudaError
from polder.memory.page import Handle, as_indices, contiguous, runs
from tests.memory.machines import Machine


def test_bytes_are_the_same_at_a_new_address(machine: Machine) -> None:
    backend, page = machine.backend, machine.page
    address = backend.reserve(8 * page)
    with machine.pages(2) as handles:
        backend.map(address, handles)
        machine.fill(address, 1)
        machine.fill(address + page, 2)
        backend.unmap(address, 2)
        backend.map(address + 5 * page, handles[::-1])
        assert machine.bytes(address + 5 * page) == {2}
        assert machine.bytes(address + 6 * page) == {1}
        backend.unmap(address + 5 * page, 2)
    backend.free(address, 8 * page)


def test_one_page_at_two_addresses_is_one_page(machine: Machine) -> None:
    backend, page = machine.backend, machine.page
    address = backend.reserve(2 * page)
    with machine.pages(1) as handles:
        backend.map(address, [handles[0], handles[0]])
        machine.fill(address, 9)
        assert machine.bytes(address + page) == {9}
        backend.unmap(address, 2)
    backend.free(address, 2 * page)


def test_an_unmapped_access_faults(machine: Machine) -> None:
    if machine.kind == "cuda":
        pytest.skip("a real illegal address spoils the process's context")
    backend, page = machine.backend, machine.page
    address = backend.reserve(3 * page)
    with machine.pages(1) as handles:
        assert machine.touch_kills(address + page)
        backend.map(address + page, handles)
        assert not machine.touch_kills(address + page)
        assert machine.touch_kills(address)
        assert machine.touch_kills(address + 2 * page)
        backend.unmap(address + page, 1)
        assert machine.touch_kills(address + page)
    backend.free(address, 3 * page)


def test_addresses_are_aligned_to_2_mib(machine: Machine) -> None:
    address = machine.backend.reserve(machine.page)
    assert address % (2 << 20) == 0
    machine.backend.free(address, machine.page)


def test_misuse_is_refused_and_changes_nothing(machine: Machine) -> None:
    backend, page = machine.backend, machine.page
    address = backend.reserve(4 * page)
    with machine.pages(3) as handles:
        backend.map(address, handles[:2])
        machine.fill(address, 5, 2 * page)
        for misuse in (
            lambda: backend.map(address + page, handles[2:]),  # taken
            lambda: backend.map(address + 2 * page + 4096, handles[2:]),  # misaligned
            lambda: backend.map(address + 3 * page, handles[2:] * 2),  # over the end
            lambda: backend.map(address + 2 * page, [Handle(1 << 40)]),  # no such page
            lambda: backend.unmap(address, 3),  # a hole at the end
            lambda: backend.free(address, 4 * page),  # still mapped
            lambda: backend.free(address, 3 * page),  # not the size reserved
        ):
            with pytest.raises(PolderError):
                misuse()
        assert machine.bytes(address, 2 * page) == {5}
        backend.map(address + 2 * page, handles[2:])
        backend.unmap(address, 3)
    backend.free(address, 4 * page)


def test_zero_is_over_when_it_returns(machine: Machine) -> None:
    backend, page = machine.backend, machine.page
    address = backend.reserve(3 * page)
    with machine.pages(3) as handles:
        backend.map(address, handles)
        machine.fill(address, 0x7F, 3 * page)
        backend.zero(address + page, page)
        assert [machine.bytes(address + i * page) for i in range(3)] == [{0x7F}, {0}, {0x7F}]
        backend.fence()
        backend.unmap(address, 3)
    backend.free(address, 3 * page)


def test_out_of_memory_takes_nothing(machine: Machine) -> None:
    backend = machine.backend
    before = backend.resident_bytes()
    if machine.kind == "cpu":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(OutOfPages):
                backend.create(1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    else:
        with pytest.raises(OutOfPages, match=r"room for \d+ of 1000000 pages"):
            backend.create(1_000_000)
    assert backend.resident_bytes() == before
    with machine.pages(10):
        pass


def test_destroyed_memory_returns_and_its_handles_are_dead(machine: Machine) -> None:
    backend, page = machine.backend, machine.page
    address = backend.reserve(4 * page)
    handles = backend.create(4)
    backend.map(address, handles)
    machine.fill(address, 1, 4 * page)
    assert backend.resident_bytes() == 4 * page
    backend.unmap(address, 4)
    backend.destroy(handles[1:3])
    assert backend.resident_bytes() == 2 * page
    for use in (backend.destroy, backend.drop, lambda dead: backend.map(address, dead)):
        with pytest.raises(PolderError):
            use(handles[1:3])
    backend.destroy([handles[0], handles[3]])
    assert backend.resident_bytes() == 0
    backend.free(address, 4 * page)


def test_a_handle_cannot_be_destroyed_twice_in_one_call(machine: Machine) -> None:
    with machine.pages(2) as handles, machine.span(1) as span:
        span.map([0], handles[:1])
        machine.fill(span.address(0), 1)
        with pytest.raises(IntegrityError):
            machine.backend.destroy([handles[0], handles[0]])
        assert machine.bytes(span.address(0)) == {1}


def test_an_adopted_page_is_the_page(machine: Machine) -> None:
    backend, page, other = machine.backend, machine.page, machine.another()
    here, there = backend.reserve(3 * page), other.reserve(3 * page)
    with machine.pages(3) as handles:
        backend.map(here, handles)
        fds, fd_index, offsets = backend.export_many(handles)
        assert not any(os.get_inheritable(fd) for fd in fds)
        adopted = other.adopt_many(fds, fd_index, offsets)
        one, index, offset = backend.export_many(handles[1:2])
        [again] = other.adopt_many(one, index, offset)
        for number in [*fds, *one]:
            os.close(number)
        other.map(there, [*adopted[:2], again])
        machine.fill(here, 1)
        machine.fill(here + page, 2)
        assert [machine.bytes(there + i * page) for i in range(3)] == [{1}, {2}, {2}]
        other.unmap(there, 3)
        other.drop([*adopted, again])
        assert machine.bytes(here) == {1}, "dropping an adopted page must not harm it"
        backend.unmap(here, 3)
    backend.free(here, 3 * page)
    other.free(there, 3 * page)


def test_handles_that_do_not_fit_are_refused(machine: Machine) -> None:
    with machine.pages(1) as handles:
        fds, _, _ = machine.backend.export_many(handles)
        for fd_index, offsets in (
            ([0, 0], [0]),
            ([1], [0]),
            ([-1], [0]),
            ([0], [100]),
            ([0], [1 << 30]),
            ([0], [-(2 << 20)]),
        ):
            with pytest.raises(ProtocolError):
                machine.another().adopt_many(fds, fd_index, offsets)
        os.close(fds[0])


def test_a_page_outlives_its_handle_while_it_is_mapped(machine: Machine) -> None:
    if machine.kind == "cpu":
        pytest.skip("destroying a CPU page punches it for everybody, as documented")
    backend = machine.backend
    address = backend.reserve(machine.page)
    handles = backend.create(1)
    backend.map(address, handles)
    machine.fill(address, 3)
    backend.destroy(handles)
    assert machine.bytes(address) == {3}
    backend.unmap(address, 1)
    backend.free(address, machine.page)


# ---------------------------------------------------------------- the CPU


def test_ten_thousand_cpu_pages_cost_one_fd(cpu: Machine) -> None:
    gc.collect()  # what other tests have left is not closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    handles = cpu.backend.create(10_000)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    fds, fd_index, offsets = cpu.backend.export_many(handles)
    assert len(fds) == 1
    other = cpu.another()
    for _ in range(3):  # an engine adopts pages of the same segment again and again
        other.adopt_many(fds, fd_index, offsets)
        assert len(os.listdir("/proc/self/fd")) == before + 3
    os.close(fds[0])
    cpu.backend.destroy(handles)
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_cpu_pages_come_zeroed_and_take_no_memory_before(cpu: Machine) -> None:
    with cpu.pages(100) as handles, cpu.span(1) as span:
        assert cpu.backend.resident_bytes() == 0
        span.map([0], handles[50:51])
        assert cpu.bytes(span.address(0)) == {0}
        assert cpu.backend.resident_bytes() == cpu.page
        span.unmap([0])


def test_a_peer_cannot_shrink_a_segment_under_the_others(cpu: Machine) -> None:
    with cpu.pages(2) as handles:
        [fd], _, _ = cpu.backend.export_many(handles[:1])
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.close(fd)


def test_a_map_that_fails_half_way_unmaps_what_it_had_mapped_on_the_cpu(
    cpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = _libc.map_file, []

    def fail_third(*arguments: int) -> None:
        calls.append(arguments)
        real(*arguments)
        if len(calls) == 3:
            raise OutOfPages("injected")

    address = cpu.backend.reserve(5 * cpu.page)
    with cpu.pages(8) as handles:
        monkeypatch.setattr(_libc, "map_file", fail_third)
        with pytest.raises(OutOfPages):
            cpu.backend.map(address, [*handles[:2], handles[4], handles[6], handles[7]])
        assert [call[1] // cpu.page for call in calls] == [2, 1, 2], "one mmap for each stretch of neighbours"
        assert all(cpu.touch_kills(address + i * cpu.page) for i in range(5))
        cpu.backend.map(address, handles[:5])
        cpu.backend.unmap(address, 5)
    cpu.backend.free(address, 5 * cpu.page)


def test_page_sizes_that_mmap_cannot_do_are_refused() -> None:
    for size in (0, -4096, 4095, 6000):
        with pytest.raises(ConfigError, match="multiple of 4096"):
            CpuBackend(page_bytes=size)


# ---------------------------------------------------------------- CUDA


def test_one_set_access_and_one_unmap_a_run(fake: Machine) -> None:
    assert fake.fake is not None
    with fake.pages(10) as handles, fake.span(16) as span:
        fake.fake.reset()
        span.map([1, 2, 3, 4, 5, 9, 10, 11, 14, 15], handles)
        assert fake.fake.calls("cuMemMap") == 10
        assert fake.fake.calls("cuMemSetAccess") == 3
        span.unmap([2, 1, 3, 4, 5, 9, 10, 11, 14, 15])
        assert fake.fake.calls("cuMemUnmap") == 3
        assert fake.fake.calls("cuMemRelease") == 0, "pooled pages must not be released by remapping"


@pytest.mark.parametrize(("function", "nth"), [("cuMemMap", 1), ("cuMemMap", 3), ("cuMemSetAccess", 1)])
def test_a_map_that_fails_half_way_unmaps_what_it_had_mapped_on_cuda(fake: Machine, function: str, nth: int) -> None:
    assert fake.fake is not None
    address = fake.backend.reserve(4 * fake.page)
    with fake.pages(4) as handles:
        fake.fake.fail(function, nth, 2)
        with pytest.raises(OutOfPages):
            fake.backend.map(address, handles)
        assert all(fake.touch_kills(address + i * fake.page) for i in range(4))
        fake.backend.map(address, handles)
        fake.backend.unmap(address, 4)
    fake.backend.free(address, 4 * fake.page)


def test_driver_errors_carry_the_drivers_name(fake: Machine) -> None:
    from polder.memory.cuda import CudaError

    with pytest.raises(CudaError, match="cuMemUnmap: CUDA_ERROR_INVALID_VALUE") as caught:
        fake.backend.unmap(0x1000, 1)
    assert caught.value.name == "CUDA_ERROR_INVALID_VALUE"
    assert isinstance(caught.value, EnvironmentFault)


def test_writable_host_memory_is_pinned_once_and_may_be_made_read_only_afterwards(fake: Machine) -> None:
    """The fake knows no read-only registration, as some devices do not."""
    assert fake.fake is not None
    memory = mmap.mmap(-1, 16384)
    array = np.frombuffer(memory, np.uint8)
    address = int(array.ctypes.data)
    fake.backend.pin(address, 8192)
    with pytest.raises(CudaError, match="REGISTERED"):
        fake.backend.pin(address, 8192)
    _libc.make_read_only(address, 8192)
    fake.backend.unpin(address)
    with pytest.raises(IntegrityError):
        fake.backend.unpin(address)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        fake.backend.pin(address, 8192)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        fake.backend.pin(address + 8192 + 1, 4096)
    fake.backend.pin(address + 8192, 4096)
    fake.backend.unpin(address + 8192)


def test_much_host_memory_is_pinned_in_pieces_or_not_at_all(fake: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake.fake is not None
    monkeypatch.setattr(cuda, "_PINNED_AT_ONCE", 4096)
    memory = mmap.mmap(-1, 3 * 4096)
    address = int(np.frombuffer(memory, np.uint8).ctypes.data)
    fake.fake.fail("cuMemHostRegister_v2", 3)
    with pytest.raises(CudaError):
        fake.backend.pin(address, 3 * 4096)
    fake.backend.pin(address, 3 * 4096)
    fake.backend.unpin(address)
    fake.backend.pin(address, 3 * 4096)
    fake.backend.unpin(address)


def test_cuda_pages_below_the_granularity_are_refused(fake: Machine) -> None:
    from polder.memory.cuda import CudaBackend

    with pytest.raises(ConfigError, match="multiples of 2097152 bytes"):
        CudaBackend(0, page_bytes=1 << 20)
    with pytest.raises(EnvironmentFault, match="CUDA_ERROR_INVALID_DEVICE"):
        CudaBackend(7)


def test_without_a_driver_the_error_says_so() -> None:
    script = """
import polder.errors
from polder.memory.cuda import CudaBackend
try:
    CudaBackend(0)
except polder.errors.EnvironmentFault as error:
    print(error)
"""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a real NVIDIA driver is here")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "driver" in result.stdout or "cuda-bindings is not installed" in result.stdout


# ---------------------------------------------------------------- helpers


def test_runs_are_maximal_and_in_order() -> None:
    assert runs(as_indices([4, 5, 6, 2, 9, 10])) == [(4, 3), (2, 1), (9, 2)]
    assert runs(as_indices([])) == []
    assert runs(as_indices([3, 3])) == [(3, 1), (3, 1)]


def test_contiguous_handles_are_neighbours_of_one_segment() -> None:
    handles = [Handle(3, 0), Handle(3, 10), Handle(4, 20), Handle(4, 0), Handle(4, 10)]
    assert contiguous(handles, 10) == [(0, 2), (2, 1), (3, 2)]
    assert contiguous([], 10) == []
