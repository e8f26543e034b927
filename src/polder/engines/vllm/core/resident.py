"""Weights that stay where they are: what the core and its demand ask of weights, answered for a model that cannot move
them."""

from __future__ import annotations

import logging
from typing import Any

from polder.broker.wire import Demand, Grant, Pages, Recall
from polder.engines.vllm.core.subsystem import Subsystem

__all__ = ["ResidentWeights"]

logger = logging.getLogger("polder.engine")


class ResidentWeights(Subsystem):
    """CoreWeights overrides all of it."""

    @property
    def asleep(self) -> bool:
        """Whether no weights are in memory."""
        return False

    @property
    def pages(self) -> Pages:
        """Pages of weights that the broker lends, per rank."""
        return []

    def demand(self, now: float) -> dict[str, Any]:
        """Fields of Demand."""
        return {}

    def turned(self, sent: Demand) -> bool:
        """Whether it has gone idle, busy, asleep or awake since this demand."""
        return False

    def on_grant(self, message: Grant, generation: int, now: float) -> None:
        logger.warning("unexpected grant %d: these weights do not move", message.lease)

    def on_recall(self, message: Recall, generation: int, now: float) -> None:
        logger.warning("unexpected recall %d: these weights do not move", message.lease)
