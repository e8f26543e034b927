"""How much prefill a step may hold, so that requests that decode get their next token in time.

With more KV memory more requests run at once, and each of them feels the others' prefills: a step that computes a long chunk of a
prompt keeps every decoding request waiting for as long. An operator who says how long a token may take (`tbt_goal`) gets chunks of
the length that fits, by measured times:

    tokens = (goal - seconds of a step without prefill) / seconds of one more prompt token

Both times are this engine's own and change with batch, contexts and what else the device does. They are taken from the last steps
of their kind: the median of those that only decoded, which a pause in between does not move, and of chunks the dearest but three in
sixteen, for the goal is to hold for nearly all tokens.
"""

from __future__ import annotations

from collections import deque

__all__ = ["StepPace"]

_STEPS = 16
_DEAREST = 0.8
"""Quantile of the chunks' times a token."""


class StepPace:
    """The most prompt tokens of a step, kept current by the steps themselves."""

    def __init__(self, goal_s: float, *, least_tokens: int) -> None:
        """`least_tokens`: of a chunk, also where the goal cannot be met, so that prompts get done."""
        self._goal_s, self._least_tokens = goal_s, least_tokens
        self._decode_s: deque[float] = deque(maxlen=_STEPS)
        self._token_s: deque[float] = deque(maxlen=_STEPS)

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """A step with `prompt_tokens` tokens of prompts, besides what decodes, took `seconds`."""
        if prompt_tokens == 0:
            self._decode_s.append(seconds)
        elif prompt_tokens >= self._least_tokens:  # a few tokens more are lost in the noise of a step
            self._token_s.append(max(0.0, seconds - self._decode()) / prompt_tokens)

    @property
    def most_prompt_tokens(self) -> int:
        """Beside requests that decode. Until a chunk was measured, `least_tokens`."""
        token_s = _quantile(self._token_s, _DEAREST)
        if not token_s:
            return self._least_tokens
        return max(self._least_tokens, int((self._goal_s - self._decode()) / token_s))

    def _decode(self) -> float:
        return _quantile(self._decode_s, 0.5)


def _quantile(seen: deque[float], part: float) -> float:
    return sorted(seen)[int(part * (len(seen) - 1))] if seen else 0.0
