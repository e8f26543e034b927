"""`tbt_goal` with a window: at its start an engine measures what a windowed token costs, and promises no context that
is slower.

`max_model_len` is then what is possible: with "auto" the engine lowers it, and vLLM's front end refuses longer requests
with that number; one that was asked for and is too long ends the start with an error that says what is possible. As the
copies of a step are bounded by what the longest request needs (core.py opens no more units), the promise holds for a
batch of them, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from polder.engines.vllm.window.agreement import WindowAgreement
from polder.engines.vllm.window.measure import measure
from polder.errors import BudgetError
from polder.metrics import WINDOW_POINTS
from polder.planner.window_steps import StepFigures, decode_step_seconds, longest_within
from polder.units import format_bytes

__all__ = ["keep_goal"]

logger = logging.getLogger("polder.engine")


def keep_goal(core: Any, agreement: WindowAgreement, goal_s: float, rpc: Callable[..., list[Any]]) -> dict[str, float]:
    """Measures, and lowers max_model_len if it was "auto". Returns gauges. Raises BudgetError when it was given and is
    too long."""
    config, scheduler = core.vllm_config.model_config, core.scheduler
    regular_tokens = max(1, agreement.regular_units * agreement.unit_blocks - 1) * agreement.block_tokens
    figures = _slowest(rpc(measure, min(regular_tokens, config.max_model_len)))

    def windowed(tokens: int) -> int:
        blocks = -(-(tokens + 1) // agreement.block_tokens)
        return agreement.shape.windowed_blocks(blocks, agreement.regular_units, agreement.unit_blocks)

    asked = config.max_model_len
    possible = longest_within(figures, goal_s, asked, windowed)
    planned_s = decode_step_seconds(figures, asked, windowed(asked))
    logger.info(
        "window: a token after %d takes %.1f ms by what was measured (%s/s for copies), %d tokens are possible within %g ms",
        asked,
        1e3 * planned_s,
        format_bytes(int(figures.link_bytes_per_s)),
        possible,
        1e3 * goal_s,
    )
    if possible < asked:
        if config.original_max_model_len != -1 or not possible:
            raise BudgetError(
                f"max_model_len {asked}: with {windowed(asked)} windowed blocks a token takes {1e3 * planned_s:.1f} ms by what was "
                f"measured at the start, more than tbt_goal of {1e3 * goal_s:g} ms. Possible are {possible} tokens: write "
                f"--max-model-len {possible} or auto, raise the KV budget or POLDER_TBT_GOAL"
            )
        config.max_model_len = scheduler.max_model_len = scheduler.kv_cache_manager.max_model_len = possible
        core.collective_rpc("update_max_model_len", args=(possible,))
        logger.info("window: max_model_len is %d", possible)
    measured = list(zip(WINDOW_POINTS, figures.windowed_steps, strict=False))
    return {
        "window_step_seconds": figures.step_s,
        "window_context_seconds_per_token": figures.token_s,
        "window_layer_seconds": figures.overhead_s,
        "window_link_bytes_per_second": figures.link_bytes_per_s,
        "window_contention_seconds_per_byte": figures.contention_s_per_byte,
        **{f"window_measured_{at}_blocks": float(blocks) for at, (blocks, _) in measured},
        **{f"window_measured_{at}_seconds": more_s for at, (_, more_s) in measured},
    }


def _slowest(ranks: list[StepFigures]) -> StepFigures:
    """The slowest of all ranks in each figure."""
    return replace(
        ranks[0],
        step_s=max(rank.step_s for rank in ranks),
        token_s=max(rank.token_s for rank in ranks),
        overhead_s=max(rank.overhead_s for rank in ranks),
        link_bytes_per_s=min(rank.link_bytes_per_s for rank in ranks),
        contention_s_per_byte=max(rank.contention_s_per_byte for rank in ranks),
        windowed_steps=tuple(
            (steps[0][0], max(more_s for _, more_s in steps))
            for steps in zip(*(rank.windowed_steps for rank in ranks), strict=True)
        ),
    )
