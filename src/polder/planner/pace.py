"""How many prompt tokens a step may compute, so that decoding requests get their next token within `tbt_goal`.

Every decoding request of a batch waits while a step computes a chunk of somebody's prompt. So chunks get the length
that fits:

    tokens = (goal - seconds of a step without prefill) / seconds of one more prompt token

Both times are measured in the engine's last 16 steps of each kind. For steps without prefill it is the median, which a
single pause does not move. For chunks it is the 4th slowest of 16 (about p80), because the goal bounds the tail.
"""

from __future__ import annotations

from collections import deque

__all__ = ["StepPace"]

_STEPS = 16
_DEAREST = 0.8
"""Quantile of the chunks' seconds per token."""


class StepPace:
    """The most prompt tokens that a step may compute, by the times of the last steps."""

    def __init__(self, goal_s: float, *, least_tokens: int) -> None:
        """`least_tokens`: a chunk is never shorter, even where the goal cannot be met, so that prompts make
        progress."""
        self._goal_s, self._least_tokens = goal_s, least_tokens
        self._decode_s: deque[float] = deque(maxlen=_STEPS)
        self._token_s: deque[float] = deque(maxlen=_STEPS)

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """A step took `seconds` and computed `prompt_tokens` prompt tokens beside its decoding requests."""
        if prompt_tokens == 0:
            self._decode_s.append(seconds)
        elif prompt_tokens >= self._least_tokens:  # a few tokens are lost in the noise of a step
            self._token_s.append(max(0.0, seconds - self._decode()) / prompt_tokens)

    @property
    def most_prompt_tokens(self) -> int:
        """The limit beside decoding requests. It is `least_tokens` until a chunk was measured."""
        token_s = _quantile(self._token_s, _DEAREST)
        if not token_s:
            return self._least_tokens
        return max(self._least_tokens, int((self._goal_s - self._decode()) / token_s))

    def _decode(self) -> float:
        return _quantile(self._decode_s, 0.5)


def _quantile(seen: deque[float], part: float) -> float:
    return sorted(seen)[int(part * (len(seen) - 1))] if seen else 0.0
