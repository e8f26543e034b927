"""Sizes and times as users write them: "64GiB", "150ms". A value that cannot be read is an error, never a default."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from polder.errors import ConfigError

_BYTES = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int, *, what: str = "size") -> int:
    """`"1.5GiB"` -> 1610612736, `"22.9GB"` -> 22900000000: GiB and G are powers of 1024, GB of 1000. Integers are
    bytes, and a fraction of a byte is dropped. Raises ConfigError naming `what`."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ConfigError(f"{what}: {text} is negative")
        return text
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    number, unit = match.groups() if match else ("", None)
    if unit not in _BYTES or (not unit and "." in number):
        raise ConfigError(
            f'{what}: cannot read {text!r}; write a number and a unit such as MiB, GiB or GB, e.g. "64GiB"'
        )
    return int(Fraction(number) * _BYTES[unit])


def parse_seconds(text: str | float, *, what: str = "time") -> float:
    """`"150ms"` -> 0.15. Numbers are seconds. Raises ConfigError naming `what`."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(text)
    else:
        match = _NUMBER.fullmatch(str(text))
        unit = match.group(2) if match else None
        if match is None or unit not in _SECONDS:
            raise ConfigError(f"{what}: cannot read {text!r}; write a number and one of us, ms, s, min, e.g. 150ms")
        seconds = float(match.group(1)) * _SECONDS[unit]
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"{what}: {text} is not a time")
    return seconds


def seconds_text(seconds: float) -> str:
    """A text that `parse_seconds` reads as exactly the same number: all digits, no exponent."""
    return f"{Decimal(repr(seconds)):f}s"


def parse_goal(text: str | float, *, what: str) -> float:
    """A time above 0, in seconds. Raises ConfigError naming `what`."""
    seconds = parse_seconds(text, what=what)
    if seconds <= 0:
        raise ConfigError(f"{what}: {text!r}: write a time above 0, or leave it out")
    return seconds


def format_bytes(size: int) -> str:
    """The largest binary unit that leaves at most three digits before the point: 335544320 -> "320 MiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
