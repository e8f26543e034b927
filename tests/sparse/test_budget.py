"""Budgets are read as written, and a layout is whole blocks with a tail that is long enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.errors import ConfigError
from polder.sparse.budget import Budget, layout_of, parse_budget
from tests.conftest import examples


def test_a_budget_is_a_share_or_tokens() -> None:
    assert parse_budget("10%") == Budget(share=0.1)
    assert parse_budget(" 2.5 %") == Budget(share=0.025)
    assert parse_budget(2048) == parse_budget("2048") == Budget(tokens=2048)
    assert str(parse_budget("2.5%")) == "2.5%"


@pytest.mark.parametrize("value", ["", "0%", "101%", "-5", 0, "ten", None, True, "1e3"])
def test_another_word_is_refused_with_what_to_write(value: object) -> None:
    with pytest.raises(ConfigError, match="write a share"):
        parse_budget(value)


def test_a_budget_is_at_least_the_floor_and_at_most_all() -> None:
    assert Budget(share=0.1).units(200, unit_tokens=16, floor_tokens=0) == 20
    assert Budget(share=0.1).units(200, unit_tokens=16, floor_tokens=512) == 32
    assert Budget(tokens=100).units(200, unit_tokens=16, floor_tokens=0) == 7
    assert Budget(share=1.0).units(7, unit_tokens=16, floor_tokens=512) == 7


@examples(100)
@given(
    tokens=st.integers(0, 5000),
    unit=st.sampled_from([16, 32]),
    sinks=st.integers(0, 100),
    window=st.integers(1, 600),
)
def test_a_layout_covers_the_prefix_but_for_its_tail(tokens: int, unit: int, sinks: int, window: int) -> None:
    layout = layout_of(tokens, unit_tokens=unit, sink_tokens=sinks, window_tokens=window)
    if layout is None:
        assert tokens < window + sinks + 2 * unit
        return
    assert layout.first_token >= sinks
    assert window <= tokens - layout.end_token < window + unit
