"""The shipped traces are the ones described, and prompts share exactly what the real requests shared."""

from __future__ import annotations

import numpy as np
import pytest

from polder.bench.workloads.models import RESERVED_IDS
from polder.bench.workloads.traces import (
    VOCAB,
    AgentRow,
    BurstRow,
    ChatRow,
    agent_prompt,
    burst_prompt,
    chat_prompt,
    ideal_hit_ratio,
    load,
)


def test_row_counts() -> None:
    assert len(load(AgentRow)) == 768
    assert len(load(ChatRow)) == 227
    assert len(load(BurstRow)) == 238


def test_agent_trace_has_48_sessions_of_16_turns() -> None:
    rows = load(AgentRow)
    assert sorted({row.session for row in rows}) == list(range(48))
    for session in range(48):
        assert [row.turn for row in rows if row.session == session] == list(range(16))


def test_agent_lengths_are_the_published_ones() -> None:
    """shared/reference/workloads.md section 2: prompt mean 1,869, p50 1,544, p90 3,386, max 3,988; output mean 34, 4-64."""
    rows = load(AgentRow)
    lengths = np.array([row.input_tokens for row in rows])
    outputs = np.array([row.output_tokens for row in rows])
    assert round(lengths.mean()) == 1869
    assert np.percentile(lengths, 50) == pytest.approx(1544, abs=2)
    assert np.percentile(lengths, 90) == pytest.approx(3386, abs=2)
    assert lengths.max() == 3988
    assert round(outputs.mean()) == 34
    assert (outputs.min(), outputs.max()) == (5, 64), "clipped to 4..64, and no reply was shorter than 5"


def test_agent_ideal_hit_ratio_of_the_quick_set_is_the_published_one() -> None:
    prompts = [agent_prompt(row) for row in load(AgentRow) if row.session < 16]
    assert len(prompts) == 256
    assert ideal_hit_ratio(prompts, 16) == pytest.approx(0.916, abs=0.0005)


def test_unique_tokens_of_the_agents() -> None:
    """120,672 unique tokens over all sessions, in whole blocks of 16."""
    unique = {
        (row.session, end, tuple(prompt[end - 16 : end]))
        for row in load(AgentRow)
        for prompt in [agent_prompt(row)]
        for end in range(16, len(prompt) + 1, 16)
    }
    assert 16 * len(unique) == 120_672


def test_prompts_have_the_trace_s_lengths_and_no_reserved_ids() -> None:
    prompts = [
        *((agent_prompt(row), row.input_tokens) for row in load(AgentRow)),
        *((chat_prompt(row), row.input_tokens) for row in load(ChatRow)),
        *((burst_prompt(row), row.input_tokens) for row in load(BurstRow)),
    ]
    for prompt, length in prompts:
        assert len(prompt) == length
        assert min(prompt) >= RESERVED_IDS
        assert max(prompt) < VOCAB


def test_a_turn_continues_its_session_s_prompt() -> None:
    first, second = load(AgentRow)[:2]
    assert agent_prompt(second)[: first.input_tokens] == agent_prompt(first)


def test_sessions_share_nothing() -> None:
    prompts = [agent_prompt(row)[:32] for row in load(AgentRow) if row.turn == 0]
    assert ideal_hit_ratio(prompts, 16) == 0


def test_chat_reuse_is_low_and_bursts_have_none() -> None:
    assert ideal_hit_ratio([chat_prompt(row) for row in load(ChatRow)], 16) == pytest.approx(0.30, abs=0.01)
    assert ideal_hit_ratio([burst_prompt(row) for row in load(BurstRow)], 16) == 0


def test_bursts_come_in_bursts() -> None:
    """0 to 43 requests in 5 s."""
    windows = np.bincount([int(row.t // 5) for row in load(BurstRow)])
    assert (windows.min(), windows.max()) == (0, 43)


def test_prompt_tokens_never_change() -> None:
    """Results of different days are comparable only while these hold."""
    assert agent_prompt(load(AgentRow)[0])[:8] == [25904, 28921, 18530, 10536, 29811, 28898, 20439, 15992]


def test_ideal_hit_ratio_counts_only_behind_the_same_prefix() -> None:
    assert ideal_hit_ratio([[1, 2, 3, 4], [1, 2, 3, 4]], 2) == 0.5
    assert ideal_hit_ratio([[1, 2, 3, 4], [9, 9, 3, 4]], 2) == 0
    assert ideal_hit_ratio([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(2 / 6)
