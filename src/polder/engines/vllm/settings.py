"""How an engine is told to be elastic: environment variables, or `--additional-config '{"polder": {...}}'`.

| environment         | additional-config | meaning                                                                            |
|---------------------|-------------------|------------------------------------------------------------------------------------|
| POLDER_BROKER       | broker            | socket of the broker that shares memory between engines                            |
| POLDER_ENGINE       | engine            | this engine's name there (default: the served model's name)                        |
| POLDER_KV_BUDGET    | kv_budget         | without a broker: KV memory of this engine alone, grown on demand                  |
| POLDER_PAGE         | page              | without a broker: page size (default 2MiB)                                         |
| POLDER_KV_FLOOR     | kv_floor          | never given away (default: what one request of max_model_len needs)                |
| POLDER_KV_SHARE     | kv_share          | its own on demand; more than that is on loan (default: an equal part)              |
| POLDER_KV_CEILING   | kv_ceiling        | never more than this (default: the device's whole budget)                          |

| POLDER_TIERS        | tiers             | where blocks go that the cache has no room for: some of "peer,host,disk"           |
| POLDER_HOST         | host              | this engine's quota of host memory, all ranks together (needs the tier "host")     |
| POLDER_DISKS        | disks             | "PATH:SIZE,PATH:SIZE": directories, each on its own disk (needs the tier "disk")   |
| POLDER_DISK_WRITES  | disk_writes       | most bytes written to them in a day: "500GiB" (default: no bound)                  |
| POLDER_DISK_IO      | disk_io           | "threads" (default), or "aio": the kernel's, half the CPU time where it is allowed |
| POLDER_LEND         | lend              | most KV memory lent to other engines at a time, all ranks together (default: none) |
| POLDER_WEIGHTS      | weights           | "elastic": the broker's budget is for weights too; they leave while nobody asks    |
| POLDER_WINDOW       | window            | host memory for contexts longer than fit the device: most layers of them stay there |
| POLDER_WINDOW_LAYERS| window_layers     | layers of such a context that are on the device at a time (default: 2)              |
| POLDER_TBT_GOAL     | tbt_goal          | time a token may take while others prefill: "200ms" (default: no bound)            |
| POLDER_LINKS        | links             | for tests and benches: emulated, "peer=3.2GB/s,host=400MB/s,weights=2GB/s"         |
| POLDER_FAULTS       | faults            | for tests: faults of the tiers, "fail=0.2,corrupt=0.01,seed=1"                     |

An engine with tiers needs the connector too: --kv-transfer-config '{"kv_connector":"PolderConnector","kv_role":"kv_both"}'
(`polder serve` adds it). With neither POLDER_BROKER nor POLDER_KV_BUDGET the engine is stock vLLM. The environment wins over
additional-config.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polder.broker.transport import check_socket_path
from polder.errors import ConfigError
from polder.memory.page import PAGE_BYTES
from polder.testing.faulty_tier import parse_faults
from polder.testing.links import parse_links
from polder.units import parse_bytes, parse_goal

__all__ = ["ENVIRONMENT", "TIERS", "EngineSettings", "parse_disks", "read_settings"]

ENVIRONMENT = {
    "broker": "POLDER_BROKER",
    "engine": "POLDER_ENGINE",
    "kv_budget": "POLDER_KV_BUDGET",
    "page": "POLDER_PAGE",
    "kv_floor": "POLDER_KV_FLOOR",
    "kv_share": "POLDER_KV_SHARE",
    "kv_ceiling": "POLDER_KV_CEILING",
    "tiers": "POLDER_TIERS",
    "host": "POLDER_HOST",
    "disks": "POLDER_DISKS",
    "disk_writes": "POLDER_DISK_WRITES",
    "disk_io": "POLDER_DISK_IO",
    "lend": "POLDER_LEND",
    "weights": "POLDER_WEIGHTS",
    "window": "POLDER_WINDOW",
    "window_layers": "POLDER_WINDOW_LAYERS",
    "tbt_goal": "POLDER_TBT_GOAL",
    "links": "POLDER_LINKS",
    "faults": "POLDER_FAULTS",
}

TIERS = ("peer", "host", "disk")
"""From the fastest to the slowest."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    engine: str
    broker: Path | None
    """None: an in-process broker over `kv_budget_bytes`."""
    kv_budget_bytes: int | None
    page_bytes: int
    kv_floor_bytes: int | None
    kv_share_bytes: int | None
    kv_ceiling_bytes: int | None
    tiers: tuple[str, ...] = ()
    """Some of TIERS, in their order."""
    host_bytes: int = 0
    disks: tuple[tuple[str, int], ...] = ()
    """Directory and limit in bytes of each, all ranks together."""
    disk_writes_bytes: int | None = None
    """A day, all disks together."""
    disk_io: Literal["threads", "aio"] = "threads"
    lend_bytes: int = 0
    weights: Literal["resident", "elastic"] = "resident"
    window_bytes: int = 0
    """Host memory of the window's store, all ranks together; 0: no window."""
    window_layers: int = 2
    tbt_goal_s: float | None = None
    """None: steps as long as vLLM makes them."""
    links: str = ""
    faults: str = ""


def read_settings(
    additional_config: Mapping[str, Any], default_name: str, environment: Mapping[str, str] = os.environ
) -> EngineSettings | None:
    """The engine's settings, or None when it is to be stock. Raises ConfigError on an unknown key or a bad value."""
    given = additional_config.get("polder", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f'additional-config "polder" must be an object, not {given!r}')
    unknown = set(given) - set(ENVIRONMENT)
    if unknown:
        raise ConfigError(f"additional-config polder: unknown {sorted(unknown)}; known are {', '.join(ENVIRONMENT)}")
    values: dict[str, str | int] = dict(given)
    for key, variable in ENVIRONMENT.items():
        if environment.get(variable):
            values[key] = environment[variable]

    def size(key: str) -> int | None:
        return parse_bytes(values[key], what=ENVIRONMENT[key]) if key in values else None

    if "broker" not in values and "kv_budget" not in values:
        if values:
            raise ConfigError(
                f"{', '.join(ENVIRONMENT[key] for key in values)} given, but neither POLDER_BROKER nor POLDER_KV_BUDGET: "
                f"set one of them to make this engine elastic"
            )
        return None
    if "broker" in values and "kv_budget" in values:
        raise ConfigError("POLDER_BROKER and POLDER_KV_BUDGET exclude each other: the broker has the budget")
    broker = Path(str(values["broker"])) if "broker" in values else None
    if broker is not None:
        check_socket_path(broker)
    return EngineSettings(
        engine=str(values.get("engine", default_name)),
        broker=broker,
        kv_budget_bytes=size("kv_budget"),
        page_bytes=size("page") or PAGE_BYTES,
        kv_floor_bytes=size("kv_floor"),
        kv_share_bytes=size("kv_share"),
        kv_ceiling_bytes=size("kv_ceiling"),
        tiers=_tiers(str(values.get("tiers", "")), size("host") or 0, str(values.get("disks", ""))),
        host_bytes=size("host") or 0,
        disks=parse_disks(str(values.get("disks", "")), what="POLDER_DISKS"),
        disk_writes_bytes=size("disk_writes"),
        disk_io=_disk_io(str(values.get("disk_io", "threads"))),
        lend_bytes=size("lend") or 0,
        weights=_weights(str(values.get("weights", "resident"))),
        window_bytes=size("window") or 0,
        window_layers=_window_layers(values),
        tbt_goal_s=parse_goal(values["tbt_goal"], what=ENVIRONMENT["tbt_goal"]) if "tbt_goal" in values else None,
        links=_checked(parse_links, str(values.get("links", ""))),
        faults=_checked(parse_faults, str(values.get("faults", ""))),
    )


def parse_disks(text: str, *, what: str) -> tuple[tuple[str, int], ...]:
    """ "/mnt/a:100GiB,/mnt/b:50GiB" -> (("/mnt/a", 107374182400), ...). Raises ConfigError."""
    disks = []
    for part in filter(None, (word.strip() for word in text.split(","))):
        path, colon, size = part.rpartition(":")
        if not colon or not Path(path).is_absolute():
            raise ConfigError(
                f"{what}: cannot read {part!r}; write an absolute path and a size, e.g. /mnt/nvme0:100GiB"
            )
        disks.append((path, parse_bytes(size, what=f"{what}: {path}")))
    return tuple(disks)


def _disk_io(text: str) -> Literal["threads", "aio"]:
    if text == "aio":
        return "aio"
    if text != "threads":
        raise ConfigError(f'POLDER_DISK_IO={text!r}: write "threads" (the default) or "aio"')
    return "threads"


def _tiers(text: str, host_bytes: int, disks: str) -> tuple[str, ...]:
    named = {part.strip() for part in text.split(",") if part.strip()}
    if named - set(TIERS):
        raise ConfigError(f"POLDER_TIERS={text!r}: known are {', '.join(TIERS)}")
    if ("host" in named) != bool(host_bytes):
        raise ConfigError('the tier "host" and POLDER_HOST (its size) belong together: give both or neither')
    if ("disk" in named) != bool(disks):
        raise ConfigError('the tier "disk" and POLDER_DISKS (its directories) belong together: give both or neither')
    if "disk" in named and "host" not in named:
        raise ConfigError(
            'the tier "disk" is written from the tier "host": add "host" to POLDER_TIERS, and POLDER_HOST'
        )
    return tuple(tier for tier in TIERS if tier in named)


def _weights(text: str) -> Literal["resident", "elastic"]:
    if text == "elastic":
        return "elastic"
    if text != "resident":
        raise ConfigError(f'POLDER_WEIGHTS={text!r}: write "elastic", or "resident" (the default)')
    return "resident"


def _window_layers(values: Mapping[str, Any]) -> int:
    if "window_layers" not in values:
        return EngineSettings.window_layers
    if "window" not in values:
        raise ConfigError("POLDER_WINDOW_LAYERS is given, but no POLDER_WINDOW (host memory for its store): give both")
    text = str(values["window_layers"])
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"POLDER_WINDOW_LAYERS={text!r}: write a number of layers, 1 or more")
    return int(text)


def _checked(parse: Callable[[str], object], text: str) -> str:
    parse(text)
    return text
