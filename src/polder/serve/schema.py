"""The keys of the fleet file, and errors in its own words."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from polder.broker.policy import PolicyConfig
from polder.errors import ConfigError
from polder.memory.page import PAGE_BYTES

__all__ = ["EXAMPLE", "FleetFile", "MemoryTable", "ModelTable", "ServerTable", "read_file"]

EXAMPLE = """\
[server]
host = "127.0.0.1"                # default
port = 8000                       # default

[memory]
device = "cpu:0"                  # default: cuda:0 where there is an NVIDIA driver, else cpu:0
kv_budget = "320MiB"              # KV memory of all models together
# budget = "900MiB"               # in its place where a model has elastic weights: KV memory and those weights together
page = "2MiB"                     # default
reserve_low = 0.04                # free memory below which the reserve is refilled: a part of kv_budget, or a size ...
reserve_high = 0.08               # ... up to this (defaults)
hold = "1s"                       # cache memory changes hands no more often (default)
deadline = "200ms"                # time to give recalled memory back (default)
host = "64GiB"                    # DRAM for KV that the caches have no room for, of all models (default: none)
disks = ["/mnt/nvme0:400GiB", "/mnt/nvme1:400GiB"]  # a directory on each disk, its limit; of all models (default: none)

[[model]]                         # one for each model
name = "chat"                     # what clients write as "model"
path = "/models/llama"            # a folder with config.json; anything else that is no path is left to vLLM (a hub's name)
max_model_len = 8192              # optional, as are all that follow; "auto": as long as fits
floor = "64MiB"                   # never taken from it (default: what one request of max_model_len needs)
share = "160MiB"                  # its own on demand, more is on loan (default: an equal part)
ceiling = "1GiB"                  # never more than this (default: the whole budget)
tiers = ["peer", "host", "disk"]  # KV that its cache has no room for: to what others lend, to DRAM, then to disk (default: none)
host = "32GiB"                    # its quota of host memory (default: an equal part for each model with this tier)
disk_writes = "500GiB"            # most that it writes to all disks in a day (default: no bound)
disk_io = "threads"               # default; "aio": the kernel's, for half the CPU time where it is allowed
weights = "resident"              # default; "elastic": its weights leave the device while nobody asks it (needs budget)
window = "8GiB"                   # of memory.host: contexts longer than fit the device keep most layers there (default: no window)
window_layers = 2                 # of such a context, on the device at a time (default)
tbt_goal = "200ms"                # time a token may take: bounds others' chunks, and contexts with a window (default: no bound)
lend = "96MiB"                    # most of its KV memory that it lends at a time while idle (default: nothing)
cpus = "0-1"                      # its processes run on these cores only (default: on all)
args = ["--enforce-eager"]        # more arguments for `vllm serve`
env = { VLLM_CPU_OMP_THREADS_BIND = "0" }
"""


class ServerTable(msgspec.Struct, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8000


class MemoryTable(msgspec.Struct, forbid_unknown_fields=True):
    kv_budget: str | int = 0
    budget: str | int = 0
    device: str = ""
    page: str | int = PAGE_BYTES
    reserve_low: str | float = PolicyConfig.reserve_low_ratio
    reserve_high: str | float = PolicyConfig.reserve_high_ratio
    hold: str | float = PolicyConfig.min_hold_s
    deadline: str | float = PolicyConfig.deadline_s
    host: str | int = 0
    disks: list[str] = []


class ModelTable(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    path: str
    max_model_len: int | str | None = None
    floor: str | int | None = None
    share: str | int | None = None
    ceiling: str | int | None = None
    tiers: list[str] = []
    host: str | int | None = None
    disk_writes: str | int | None = None
    disk_io: Literal["threads", "aio"] = "threads"
    lend: str | int = 0
    weights: Literal["resident", "elastic"] = "resident"
    window: str | int = 0
    window_layers: int | None = None
    tbt_goal: str | float | None = None
    cpus: str = ""
    args: list[str] = []
    env: dict[str, str] = {}


class FleetFile(msgspec.Struct, forbid_unknown_fields=True):
    memory: MemoryTable
    model: list[ModelTable]
    server: ServerTable = msgspec.field(default_factory=ServerTable)


_TABLES: dict[str, type[msgspec.Struct]] = {
    "memory": MemoryTable,
    "model": ModelTable,
    "server": ServerTable,
    "": FleetFile,
}


def read_file(path: Path) -> FleetFile:
    """Raises ConfigError when there is no such file, when it is not TOML, or when a key is unknown, missing or of another type."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), FleetFile)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explained(str(error))}") from error


def _explained(message: str) -> str:
    """msgspec's message in the file's own words, with what to write instead."""
    text, _, where = message.partition(" - at `$")
    place = where.rstrip("`").lstrip(".")
    table = re.split(r"[.\[]", place)[0]
    known = _TABLES.get(table, FleetFile).__struct_fields__
    heading = f"{place}: " if place else ""
    if unknown := re.match(r"Object contains unknown field `(.*)`", text):
        close = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return f"{heading}unknown key {unknown[1]!r}; {hint}"
    if missing := re.match(r"Object missing required field `(.*)`", text):
        lines = {"memory": "[memory]", "model": "[[model]]"}
        return f"{heading}{missing[1]!r} is missing; add a line {lines.get(missing[1], missing[1] + ' = ...')}"
    return f"{heading}{text[:1].lower()}{text[1:]}"
