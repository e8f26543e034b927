"""The settings POLDER_LINKS and POLDER_FAULTS: how fast emulated links are, and how often emulated faults occur."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from polder.errors import ConfigError

__all__ = ["Faults", "parse_faults", "parse_links"]

_RATE = re.compile(r"(peer|host|disk|weights|window)=([0-9]+(?:\.[0-9]+)?)(k|M|G)B/s")
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
_FAULT = re.compile(r"(fail|corrupt|seed)=([0-9.]+)")


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Random faults of the tiers; the same seed gives the same faults."""

    fail: float = 0.0
    """Share of loaded blocks whose load raises an error."""
    corrupt: float = 0.0
    """Share of loaded blocks that arrive with changed bytes."""
    seed: int = 0


def parse_links(text: str) -> Mapping[str, float]:
    """Parses "peer=3.2GB/s,host=400MB/s" into bytes per second: {"peer": 3.2e9, "host": 4e8}. Raises ConfigError."""
    links: dict[str, float] = {}
    for part in _parts(text):
        match = _RATE.fullmatch(part)
        if match is None or not float(match[2]):
            raise ConfigError(
                f"link {part!r}: write peer=3.2GB/s, host=400MB/s, disk=200MB/s (each), weights=2GB/s or window=2GB/s"
            )
        links[match[1]] = float(match[2]) * _UNITS[match[3]]
    return links


def parse_faults(text: str) -> Faults:
    """Parses "fail=0.2,corrupt=0.01,seed=1". Raises ConfigError."""
    values: dict[str, float] = {}
    for part in _parts(text):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ConfigError(f"fault {part!r}: write fail=0.2, corrupt=0.01 or seed=1")
        values[match[1]] = float(match[2])
    return Faults(fail=values.get("fail", 0.0), corrupt=values.get("corrupt", 0.0), seed=int(values.get("seed", 0)))


def _parts(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]
