"""The settings of an elastic engine: environment variables, or `--additional-config '{"polder": {...}}'`.

A setting `kv_floor` is POLDER_KV_FLOOR in the environment, which wins over additional-config. With neither
POLDER_BROKER nor POLDER_KV_BUDGET the engine is stock vLLM. An engine with tiers also needs the connector, which
`polder serve` adds: --kv-transfer-config '{"kv_connector":"PolderConnector","kv_role":"kv_both"}'.
docs/settings.md is generated from this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polder.broker.transport import check_socket_path
from polder.emulation.options import parse_faults, parse_links
from polder.errors import ConfigError
from polder.memory.page import PAGE_BYTES
from polder.metrics import TIER_NAMES as TIERS
from polder.settings import (
    COUNT,
    GOAL,
    PART,
    PATH,
    SIZE,
    TEXT,
    Kind,
    Setting,
    check_known,
    choice,
    declared,
    read,
    setting,
    words,
)
from polder.units import parse_bytes

__all__ = ["DISKS", "TIERS", "EngineSettings", "engine_settings", "parse_disks", "read_settings", "settings_of"]


def parse_disks(value: str | list[str], name: str) -> tuple[tuple[str, int], ...]:
    """ "/mnt/a:100GiB,/mnt/b:50GiB", or a list -> (("/mnt/a", 107374182400), ...). Raises ConfigError."""
    disks = []
    for part in filter(None, (str(word).strip() for word in (value.split(",") if isinstance(value, str) else value))):
        path, colon, size = part.rpartition(":")
        if not colon or not Path(path).is_absolute():
            raise ConfigError(
                f"{name}: cannot read {part!r}; write an absolute path and a size, e.g. /mnt/nvme0:100GiB"
            )
        disks.append((path, parse_bytes(size, what=f"{name}: {path}")))
    return tuple(disks)


def _checked_text(parse: Callable[[str], object]) -> Kind[str]:
    def checked(value: Any, name: str) -> str:
        parse(str(value))
        return str(value)

    return Kind(checked)


DISKS: Kind[tuple[tuple[str, int], ...]] = Kind(parse_disks, lambda disks: ",".join(f"{p}:{size}" for p, size in disks))


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Sizes are for all ranks of the engine together."""

    broker: Path | None = setting(PATH, default=None, help="Socket of the broker that shares memory between engines")
    engine: str = setting(
        TEXT, default_text="the served model's name", help="This engine's name at the broker; each engine needs its own"
    )
    kv_budget_bytes: int | None = setting(
        SIZE, default=None, help="Without a broker: KV memory of this engine alone, grown on demand"
    )
    page_bytes: int = setting(SIZE, default=PAGE_BYTES, help="Size of a page, with `kv_budget` only")
    kv_floor_bytes: int | None = setting(
        SIZE,
        model="floor",
        default=None,
        default_text="what one request of max_model_len needs",
        example='"64MiB"',
        help="KV memory that is never taken from the engine",
    )
    kv_share_bytes: int | None = setting(
        SIZE,
        model="share",
        default=None,
        default_text="an equal part",
        example='"160MiB"',
        help="KV memory that the engine gets when it needs it; what it holds above is on loan",
    )
    kv_ceiling_bytes: int | None = setting(
        SIZE,
        model="ceiling",
        default=None,
        default_text="the whole budget",
        example='"1GiB"',
        help="The most KV memory that the engine may hold",
    )
    tiers: tuple[str, ...] = setting(
        words(*TIERS),
        model="tiers",
        default=(),
        default_text="none",
        example='["peer", "host", "disk"]',
        help="Where KV goes when the cache has no room for it: other engines' idle KV memory, host memory, disks",
    )
    host_bytes: int = setting(
        SIZE, model="host", default=0, example='"32GiB"', help="The engine's quota of host memory, for the tier `host`"
    )
    disks: tuple[tuple[str, int], ...] = setting(
        DISKS, default=(), help='"PATH:SIZE,PATH:SIZE": a directory on each disk and its limit, for the tier `disk`'
    )
    disk_writes_bytes: int | None = setting(
        SIZE,
        model="disk_writes",
        default=None,
        default_text="no bound",
        example='"500GiB"',
        help="The most bytes that the engine writes to all disks in a day; 0: none",
    )
    disk_io: Literal["threads", "aio"] = setting(
        choice("threads", "aio"),
        model="disk_io",
        default="threads",
        example='"threads"',
        help='How disks are read; "aio": by the kernel, for half the CPU time where it is allowed',
    )
    lend_bytes: int = setting(
        SIZE,
        model="lend",
        default=0,
        default_text="nothing",
        example='"96MiB"',
        help="The most KV memory that the engine lends at a time while it is idle",
    )
    weights: Literal["resident", "elastic"] = setting(
        choice("resident", "elastic"),
        model="weights",
        default="resident",
        example='"resident"',
        help='"elastic": the weights may leave the device while the model has no requests',
    )
    window_bytes: int = setting(
        SIZE,
        model="window",
        default=0,
        default_text="no window",
        example='"8GiB"',
        help="Host memory for contexts longer than the device's KV memory: the KV of most of their layers stays there",
    )
    window_layers: int = setting(
        COUNT,
        model="window_layers",
        default=2,
        example="2",
        help="Layers of such a context whose KV is on the device at a time",
    )
    sparse_bytes: int = setting(
        SIZE,
        model="sparse",
        default=0,
        default_text="no sparse reading",
        example='"8GiB"',
        help="Host memory for prefixes of which requests that ask for it read a part in each step",
    )
    sparse_disks: tuple[tuple[str, int], ...] = setting(
        DISKS,
        default=(),
        default_text="they lie in the host memory of `sparse`",
        help='"PATH:SIZE,PATH:SIZE": where prefixes lie that are read in part; `sparse` then holds their index alone',
    )
    sparse_least_tokens: int = setting(
        COUNT,
        model="sparse_least_tokens",
        default=2048,
        example="2048",
        help="Requests with shorter prompts read all, whatever they ask for",
    )
    sparse_most_unread: float = setting(
        PART,
        model="sparse_most_unread",
        default=1.0,
        default_text="no bound",
        example="0.2",
        help="A request that leaves more of its attention unread, by estimate, is computed again and reads all",
    )
    tbt_goal_s: float | None = setting(
        GOAL,
        model="tbt_goal",
        default=None,
        default_text="no bound",
        example='"200ms"',
        help="Goal for the time between tokens: limits prefill chunks of other requests, and contexts with a window",
    )
    wake: Literal["streamed", "whole"] = setting(
        choice("streamed", "whole"),
        default="streamed",
        help='For tests: "whole": a model that wakes computes nothing before all of its weights are back',
    )
    links: str = setting(
        _checked_text(parse_links),
        default="",
        help="For tests: emulated links, `peer=3.2GB/s,host=400MB/s,disk=200MB/s,weights=2GB/s,window=2GB/s`",
    )
    faults: str = setting(
        _checked_text(parse_faults), default="", help="For tests: faults of the tiers, `fail=0.2,corrupt=0.01,seed=1`"
    )

    def environment(self) -> dict[str, str]:
        """The variables that say these settings to an engine, "" for those that are at their default."""
        values = ((given, getattr(self, given.field)) for given in engine_settings())
        return {given.variable: "" if value == given.default else given.kind.write(value) for given, value in values}

    def check(self, name: Callable[[str], str]) -> None:
        """Raises ConfigError for settings that do not fit together. `name(key)`: what the user calls the setting."""
        if "disk" in self.tiers and "host" not in self.tiers:
            raise ConfigError(
                f'the tier "disk" is written from the tier "host": add "host" to {name("tiers")} and set {name("host")}'
            )
        for tier, key, value in (("host", "host", self.host_bytes), ("disk", "disks", self.disks)):
            if tier in self.tiers and not value:
                raise ConfigError(f'{name("tiers")} has "{tier}": set {name(key)} too')
            if value and tier not in self.tiers:
                raise ConfigError(f'{name(key)} is given: add "{tier}" to {name("tiers")}, or leave it out')
        if "disk" not in self.tiers and (self.disk_writes_bytes is not None or self.disk_io != "threads"):
            key = "disk_io" if self.disk_writes_bytes is None else "disk_writes"
            raise ConfigError(f'{name(key)} is given: add "disk" to {name("tiers")}, or leave it out')
        for key in ("sparse_disks", "sparse_least_tokens", "sparse_most_unread"):
            if getattr(self, key) != getattr(EngineSettings, key) and not self.sparse_bytes:
                raise ConfigError(f"{name(key)} is given: set {name('sparse')} (host memory) too")
        if self.window_layers != EngineSettings.window_layers and not self.window_bytes:
            raise ConfigError(f"{name('window_layers')} is given: set {name('window')} (host memory) too")


def engine_settings() -> list[Setting]:
    """All of them, in the order of the documentation."""
    return declared(EngineSettings)


def read_settings(
    additional_config: Mapping[str, Any], default_name: str, environment: Mapping[str, str] = os.environ
) -> EngineSettings | None:
    """The engine's settings, or None when it is to be stock. Raises ConfigError on an unknown key or a bad value."""
    given = additional_config.get("polder", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f'additional-config "polder" must be an object, not {given!r}')
    settings = {declaration.key: declaration for declaration in engine_settings()}
    check_known(given, settings, "additional-config polder")
    values = dict(given)
    for key, declaration in settings.items():
        if environment.get(declaration.variable):
            values[key] = environment[declaration.variable]

    def name(key: str) -> str:
        return settings[key].variable

    if "broker" not in values and "kv_budget" not in values:
        if values:
            raise ConfigError(
                f"{', '.join(map(name, values))} given, but neither POLDER_BROKER nor POLDER_KV_BUDGET: "
                f"set one of them to make this engine elastic"
            )
        return None
    if "broker" in values and "kv_budget" in values:
        raise ConfigError("POLDER_BROKER and POLDER_KV_BUDGET exclude each other: the broker has the budget")
    found = EngineSettings(**read(settings, {"engine": default_name, **values}, name))
    if found.broker is not None:
        check_socket_path(found.broker)
    found.check(name)
    return found


def settings_of(vllm_config: Any) -> EngineSettings | None:
    """The settings of the engine that has this configuration of vLLM's. None when it is stock. Raises ConfigError."""
    additional = vllm_config.additional_config
    names = vllm_config.model_config.served_model_name
    name = names[0] if isinstance(names, list) else names or vllm_config.model_config.model
    return read_settings(additional if isinstance(additional, dict) else {}, default_name=str(name))
