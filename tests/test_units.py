"""Sizes are taken as people write them, and what cannot be meant is refused with what to write."""

from __future__ import annotations

import pytest

from polder.errors import ConfigError
from polder.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("48G", 48 << 30),
        ("48 GiB", 48 << 30),
        ("320MB", 320_000_000),
        ("22.9GiB", 22 * (1 << 30) + 966367641),
        ("1.5KiB", 1536),
        ("7", 7),
        (7, 7),
    ],
)
def test_a_size_as_people_write_it(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "0.9", 0.9, True, "1GBit", "-1GiB", "1 000MiB", -1])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match="kv_budget: "):
        parse_bytes(text, what="kv_budget")
