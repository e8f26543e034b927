"""The configuration of a broker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from polder.broker.policy import PolicyConfig
from polder.errors import ConfigError
from polder.memory.page import PAGE_BYTES
from polder.planner.sharing import SharingConfig
from polder.settings import SIZE, declared, setting
from polder.units import format_bytes

__all__ = ["BROKER_SETTINGS", "BrokerConfig"]


@dataclass(frozen=True, kw_only=True)
class BrokerConfig:
    socket: Path
    devices: dict[str, int]
    """Device name ("cpu:0", "cuda:1") -> bytes of KV budget on it; "host:0" -> bytes of the host tier. Rounded down to
    pages."""
    page_bytes: int = setting(
        SIZE,
        default=PAGE_BYTES,
        example='"2MiB"',
        help="Size of a page, the smallest amount of memory that changes hands",
    )
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    recovery_s: float = 2.0
    """After a crash of the former broker: time for its engines to report, before anything is granted."""

    def __post_init__(self) -> None:
        if not self.devices:
            raise ConfigError("a broker needs at least one device, e.g. cpu:0=64GiB")
        if self.page_bytes <= 0 or self.page_bytes % 4096:
            raise ConfigError(f"page size {self.page_bytes}: must be a positive multiple of 4 KiB")
        for name, size in self.devices.items():
            kind, _, index = name.partition(":")
            if kind not in ("cpu", "cuda", "host") or not index.isdecimal():
                raise ConfigError(f"device {name!r}: write cpu:0, cuda:INDEX, or host:0 for the host tier")
            if kind == "cuda" and self.page_bytes % (2 << 20):
                raise ConfigError(f"page size {format_bytes(self.page_bytes)}: CUDA pages are multiples of 2 MiB")
            if size < self.page_bytes:
                raise ConfigError(
                    f"device {name}: {format_bytes(size)} is less than one page of {format_bytes(self.page_bytes)}"
                )

    def total_pages(self) -> dict[str, int]:
        return {name: size // self.page_bytes for name, size in self.devices.items()}


BROKER_SETTINGS = {given.key: given for given in declared(BrokerConfig, PolicyConfig)}
"""What `polder broker` has options for, and [memory] of a fleet file keys."""
