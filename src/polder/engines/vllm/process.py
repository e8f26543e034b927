"""What Polder keeps in one process of an engine: the only module of the product that holds mutable state.

vLLM calls Polder at several places in an order of its own, and passes no object of Polder's from one call to the next:
the core's plan arrives by an RPC, vLLM then allocates the KV cache, then makes the connector's worker, and later the
core sends more RPCs. What one call leaves for a later one is kept in `here`. A core and a worker may share a process;
they use different fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from polder.errors import InternalError
from polder.memory.backend import Backend
from polder.memory.devices import open_backend

if TYPE_CHECKING:
    from polder.engines.vllm.plans import WorkerPlan
    from polder.engines.vllm.rank.memory import WorkerMemory
    from polder.engines.vllm.sparse.worker import WorkerSparse
    from polder.engines.vllm.tiers.manager import TierAgreement
    from polder.engines.vllm.tiers.worker import PolderWorker
    from polder.engines.vllm.weights.offloader import WeightOffloader
    from polder.engines.vllm.weights.onednn import PackedLinear
    from polder.engines.vllm.window.worker import WorkerWindow

__all__ = ["Process", "here", "present"]

T = TypeVar("T")


@dataclass(kw_only=True)
class Process:
    patched: bool = False
    """vLLM has been patched (hooks.py)."""
    starting: Any = None
    """In a core: vLLM's EngineCore while it makes its KV cache."""
    tier_agreement: TierAgreement | None = None
    """In a core, from the start until vLLM makes its offloading manager."""
    plan: WorkerPlan | None = None
    """In a worker, from the start on; the KV cache is allocated by it."""
    rank: int = 0
    device: str = ""
    """The rank's device as the broker names it."""
    runner: Any = None
    """vLLM's model runner."""
    memory: WorkerMemory | None = None
    """In a worker, once the KV cache is allocated."""
    tiers: PolderWorker | None = None
    window: WorkerWindow | None = None
    sparse: WorkerSparse | None = None
    offloader: WeightOffloader | None = None
    packed: list[PackedLinear] = field(default_factory=list)
    """Packed linear layers by number. Compiled graphs hold the numbers; each process of a model packs in the same
    order."""
    backends: dict[tuple[str, int], Backend] = field(default_factory=dict)

    def backend(self, device: str, page_bytes: int) -> Backend:
        """This process's backend for a device: one for KV and weights, since pages of one go to the other."""
        if (device, page_bytes) not in self.backends:
            self.backends[device, page_bytes] = open_backend(device, page_bytes)
        return self.backends[device, page_bytes]


here = Process()


def present(value: T | None) -> T:
    """The value. Raises InternalError when it is not there yet: a call of vLLM's came in another order than
    expected."""
    if value is None:
        raise InternalError("a part of this engine was used before it was made, or in a process that does not have it")
    return value
