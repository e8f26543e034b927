"""What an engine core has agreed on with the broker when it starts to serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polder.broker.transport import Channel
from polder.broker.wire import Hello, Welcome
from polder.engines.vllm.plans import WeightsFound
from polder.engines.vllm.rank.geometry import KvGeometry
from polder.engines.vllm.settings import EngineSettings

if TYPE_CHECKING:
    from polder.engines.vllm.window.agreement import WindowAgreement

__all__ = ["Agreement"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What broker and engine agreed on."""

    settings: EngineSettings
    hello: Hello
    welcome: Welcome
    channel: Channel
    socket: Path
    geometry: KvGeometry
    block_tokens: list[int]
    """Tokens of a block, for each KV cache group."""
    weights: WeightsFound | None
    """None: they stay where they are."""
    window: WindowAgreement | None

    @property
    def held_units(self) -> int:
        """Units that the broker gave at first: the lowest ones."""
        return len(self.welcome.held.kv[0]) // self.hello.pages_per_unit
