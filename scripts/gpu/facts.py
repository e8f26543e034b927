"""What machine this is: driver, device, limits, versions, and what a context costs. Needs no vLLM."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from device import open_gpu
from stage import Stage, main

COMMANDS = (
    (
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.used,mig.mode.current,compute_mode",
        "--format=csv",
    ),
    ("nvidia-smi", "--query-gpu=pcie.link.gen.current,pcie.link.width.current,clocks.max.sm", "--format=csv"),
    ("nvidia-smi", "topo", "-m"),
)
PACKAGES = ("torch", "triton", "vllm", "cuda-bindings", "flashinfer-python", "numpy", "transformers")
FILES = (
    "/proc/sys/vm/max_map_count",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/proc/sys/kernel/yama/ptrace_scope",
    "/proc/sys/fs/file-max",
)


def stage(stage: Stage) -> None:
    stage.note("kernel", platform.release())
    stage.note("python", sys.version.split()[0])
    stage.note("cores", os.cpu_count())
    stage.note("host memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30, "GiB")
    stage.note("open files, soft and hard", resource.getrlimit(resource.RLIMIT_NOFILE))
    stage.note("locked memory, soft and hard", resource.getrlimit(resource.RLIMIT_MEMLOCK))
    for name in FILES:
        if Path(name).is_file():
            stage.note(name, Path(name).read_text().strip())
    shm = shutil.disk_usage("/dev/shm")
    stage.note("/dev/shm", shm.total >> 20, "MiB")
    stage.note("pid 1 is", Path("/proc/1/comm").read_text().strip())
    for name in PACKAGES:
        try:
            stage.note(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            stage.note(name, "not installed")
    for command in COMMANDS if stage.device == "cuda" else ():
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            stage.note(" ".join(command[:2]), (done.stdout or done.stderr).strip())
    with open_gpu(stage.device) as gpu:
        driver = gpu.backend.driver
        stage.note("driver's CUDA version", int(driver.call("cuDriverGetVersion")))
        with driver.current():
            free, total = driver.call("cuMemGetInfo")
        stage.note("free with a context", int(free) >> 20, "MiB")
        stage.note("total", int(total) >> 20, "MiB")
        stage.note("page", gpu.backend.page_bytes >> 10, "KiB")
        if stage.device == "cuda":
            stage.note("this process's part of the device", _own_mib(), "MiB")
            attributes = driver.api.CUdevice_attribute
            for name in sorted(vars(attributes)):
                if (
                    "VIRTUAL_MEMORY" in name
                    or "HANDLE_TYPE_POSIX" in name
                    or "READ_ONLY_HOST" in name
                    or "ASYNC_ENGINE" in name
                ):
                    value = int(driver.call("cuDeviceGetAttribute", getattr(attributes, name), 0))
                    stage.note(name.removeprefix("CU_DEVICE_ATTRIBUTE_").lower(), value)


def _own_mib() -> str:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    own = [line.split(",")[1].strip() for line in done.stdout.splitlines() if line.startswith(f"{os.getpid()},")]
    return own[0] if own else f"unknown, of {len(done.stdout.splitlines())} processes"


if __name__ == "__main__":
    sys.exit(main("facts", stage))
