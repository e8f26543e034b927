"""Chunks of prefill are as long as the goal allows, by measured times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.planner.pace import StepPace


def paced(goal_s: float, *, decode_s: float = 0.02, token_s: float = 0.001, least_tokens: int = 64) -> StepPace:
    pace = StepPace(goal_s, least_tokens=least_tokens)
    for _ in range(16):
        pace.observe(0, decode_s)
        pace.observe(200, decode_s + 200 * token_s)
    return pace


def test_the_first_chunk_is_small() -> None:
    pace = StepPace(10.0, least_tokens=64)
    assert pace.most_prompt_tokens == 64
    pace.observe(0, 0.02)
    assert pace.most_prompt_tokens == 64


@given(
    st.floats(0.01, 2.0),
    st.floats(0.001, 1.0),
    st.floats(1e-5, 1e-2),
)
def test_a_step_with_the_longest_chunk_keeps_the_goal_unless_the_least_chunk_breaks_it(
    goal_s: float, decode_s: float, token_s: float
) -> None:
    tokens = paced(goal_s, decode_s=decode_s, token_s=token_s).most_prompt_tokens
    assert tokens == 64 or decode_s + tokens * token_s <= goal_s * 1.001
    assert decode_s + (tokens + 2) * token_s > goal_s * 0.999


def test_one_long_pause_between_decoding_steps_changes_nothing() -> None:
    pace = paced(0.2)
    before = pace.most_prompt_tokens
    pace.observe(0, 3.0)
    assert pace.most_prompt_tokens == pytest.approx(before, abs=1)


def test_chunks_shrink_when_tokens_become_dearer_and_grow_again() -> None:
    pace = paced(0.2)
    before = pace.most_prompt_tokens
    for _ in range(16):
        pace.observe(100, 0.02 + 100 * 0.004)
    assert pace.most_prompt_tokens == pytest.approx(0.18 / 0.004, abs=20)
    for _ in range(16):
        pace.observe(100, 0.02 + 100 * 0.001)
    assert pace.most_prompt_tokens == pytest.approx(before, abs=1)


def test_a_few_tokens_say_nothing_of_the_time_of_one() -> None:
    pace = paced(0.2)
    before = pace.most_prompt_tokens
    for _ in range(40):
        pace.observe(3, 0.5)
    assert pace.most_prompt_tokens == before
