"""How much of its prefix a request reads, and which of its tokens are units."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polder.errors import ConfigError

__all__ = ["Budget", "Layout", "layout_of", "parse_budget"]

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Exactly one of both is set."""

    share: float | None = None
    tokens: int | None = None

    def units(self, units: int, *, unit_tokens: int, floor_tokens: int) -> int:
        """Units that each layer selects in a step: at least one, at least `floor_tokens`, at most all."""
        wanted = -(-self.tokens // unit_tokens) if self.tokens is not None else round((self.share or 0.0) * units)
        return min(units, max(wanted, 1, -(-floor_tokens // unit_tokens)))

    def __str__(self) -> str:
        return f"{self.tokens}" if self.tokens is not None else f"{(self.share or 0.0) * 100:g}%"


def parse_budget(value: object) -> Budget:
    """ "10%" -> a share; 2048 or "2048" -> tokens. Raises ConfigError."""
    text = str(value).strip()
    if (found := _PERCENT.fullmatch(text)) and 0 < float(found[1]) <= 100:
        return Budget(share=float(found[1]) / 100)
    if text.isascii() and text.isdigit() and int(text):
        return Budget(tokens=int(text))
    raise ConfigError(f'sparse: cannot read {value!r}; write a share such as "10%", or a number of tokens such as 2048')


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A prefix in blocks: [sinks | units | tail]. Sinks and tail stay ordinary blocks and are always attended to."""

    sink_blocks: int
    units: int
    unit_tokens: int

    @property
    def first_token(self) -> int:
        return self.sink_blocks * self.unit_tokens

    @property
    def end_block(self) -> int:
        """The first block of the tail."""
        return self.sink_blocks + self.units

    @property
    def end_token(self) -> int:
        return self.end_block * self.unit_tokens


def layout_of(tokens: int, *, unit_tokens: int, sink_tokens: int, window_tokens: int) -> Layout | None:
    """The layout of a prefix of so many tokens, whose last `window_tokens`, at least, are its tail. None: it has no unit."""
    sinks = -(-sink_tokens // unit_tokens)
    units = (tokens - window_tokens) // unit_tokens - sinks
    return Layout(sink_blocks=sinks, units=units, unit_tokens=unit_tokens) if units > 0 else None
