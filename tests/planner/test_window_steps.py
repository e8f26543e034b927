"""What a window's engine promises is in time by its own figures, and nothing longer is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polder.planner.window_steps import StepFigures, decode_step_seconds, longest_within
from polder.window.regions import WindowShape

FIGURES = st.builds(
    StepFigures,
    layers=st.just(8),
    window_layers=st.integers(1, 4),
    block_bytes=st.just(32 << 10),
    block_tokens=st.just(16),
    step_s=st.floats(0.001, 0.05),
    token_s=st.floats(0.0, 1e-5),
    overhead_s=st.floats(0.0, 1e-3),
    link_bytes_per_s=st.floats(1e8, 1e11),
)
UNIT_BLOCKS = 2
HELD = st.integers(2, 12)


def shape_of(figures: StepFigures) -> WindowShape:
    return WindowShape(layers=figures.layers, window_layers=figures.window_layers, store_units=1000)


def windowed_of(figures: StepFigures, held: int, tokens: int) -> int:
    return shape_of(figures).windowed_blocks(-(-(tokens + 1) // figures.block_tokens), held, UNIT_BLOCKS)


def most_tokens(figures: StepFigures, held: int) -> int:
    """That have room at all."""
    return (shape_of(figures).most(held) * UNIT_BLOCKS - 1) * figures.block_tokens - 1


@given(figures=FIGURES, held=HELD, goal_s=st.floats(0.0005, 0.2), share=st.floats(0.0, 1.0))
def test_the_longest_context_in_time_is_the_longest(
    figures: StepFigures, held: int, goal_s: float, share: float
) -> None:
    most = max(1, int(share * most_tokens(figures, held)))

    def in_time(tokens: int) -> bool:
        windowed = windowed_of(figures, held, tokens)
        return not windowed or decode_step_seconds(figures, tokens, windowed) <= goal_s

    found = longest_within(figures, goal_s, most, lambda tokens: windowed_of(figures, held, tokens))
    whole_blocks = [*range(0, most + 1, figures.block_tokens), most]
    assert found == max(tokens for tokens in whole_blocks if in_time(tokens))


@given(figures=FIGURES, held=HELD)
def test_what_needs_no_window_is_possible_whatever_the_goal(figures: StepFigures, held: int) -> None:
    regular = ((held - 1) * UNIT_BLOCKS - 2) * figures.block_tokens
    found = longest_within(figures, 1e-9, most_tokens(figures, held), lambda tokens: windowed_of(figures, held, tokens))
    assert found >= min(regular, most_tokens(figures, held))


@given(figures=FIGURES, blocks=st.integers(1, 500))
def test_a_step_is_as_long_as_its_computing_and_at_most_its_copies_and_overheads_longer(
    figures: StepFigures, blocks: int
) -> None:
    tokens = blocks * figures.block_tokens
    compute_s = figures.step_s + figures.token_s * tokens
    copies_s = figures.layers * (blocks + 1) * figures.block_bytes / figures.link_bytes_per_s
    step_s = decode_step_seconds(figures, tokens, blocks)
    assert compute_s * 0.999 <= step_s <= 1.001 * (compute_s + copies_s + figures.layers * figures.overhead_s)
