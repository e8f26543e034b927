"""`polder plan --device here`: measures this machine in a second or two. The best of some tries counts, as if it were
idle."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from polder.planner.devices import ATTENTION_PART, FLOPS_PART, Device, Link

__all__ = ["measure_device"]

TRIES = 5
COPIED_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
MATRIX_SIDE = {"cpu": 512, "cuda": 8192}
"""Some CPUs have no instructions for bfloat16: a product of 1,536 took them seconds."""


def measure_device() -> Device:
    """The first GPU, or the CPU if there is none: memory, its bandwidth, bf16 matrix products, copies from host
    memory."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = kind == "cuda"
    memory = (
        torch.cuda.get_device_properties(0).total_memory
        if cuda
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    wait = torch.cuda.synchronize if cuda else _nothing
    size = COPIED_BYTES[kind]
    here, there = (torch.empty(size, dtype=torch.int8, device=kind).fill_(1) for _ in range(2))
    copy_s = _best_s(lambda: there.copy_(here), wait)
    outside = torch.empty(size, dtype=torch.int8, pin_memory=cuda).fill_(1)
    load_s = _best_s(lambda: here.copy_(outside, non_blocking=True), wait)
    side = MATRIX_SIDE[kind]
    matrix = torch.ones(side, side, dtype=torch.bfloat16, device=kind)
    product_s = _best_s(lambda: matrix @ matrix, wait)
    flops = 2 * side**3 / product_s
    return Device(
        name=torch.cuda.get_device_name(0) if cuda else f"this CPU, {torch.get_num_threads()} threads",
        memory_bytes=memory,
        memory_bytes_per_s=2 * size / copy_s,  # read and written
        flops_per_s=flops,
        attention_flops_per_s=flops * ATTENTION_PART / FLOPS_PART,
        host_link=Link(name="host memory", bytes_per_s=size / load_s, source="measured here"),
        source=f"measured here, best of {TRIES}; attention at {ATTENTION_PART / FLOPS_PART:.2f} of it: assumption",
    )


def _best_s(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    found = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - started)
    return min(found)


def _nothing() -> None:
    pass
