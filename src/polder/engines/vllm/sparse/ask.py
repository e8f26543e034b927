"""What a request asks for. Both the core and the workers read it from the request itself.

extra_body={"kv_transfer_params": {"polder": {"sparse": "10%"}}}    of the OpenAI API
extra_body={"vllm_xargs": {"polder_sparse": "10%"}}                 the same
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polder.errors import ConfigError
from polder.sparse.budget import Budget, parse_budget
from polder.sparse.methods import METHODS, Method

__all__ = ["Ask", "ask_of", "asks"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    budget: Budget
    slots: float = 2.0
    """Slots of a layer over the units that it selects. What lies in slots is attended to."""
    method: Method = "polder"
    """Others are for comparisons."""


def asks(sampling_params: Any) -> Any:
    """What a request has written as its budget; None: it is an ordinary one."""
    found = _polder(sampling_params).get("sparse")
    return found if found is not None else (getattr(sampling_params, "extra_args", None) or {}).get("polder_sparse")


def ask_of(sampling_params: Any) -> Ask | None:
    """None: it is an ordinary one. Raises ConfigError for what cannot be read."""
    budget = asks(sampling_params)
    if budget is None:
        return None
    slots = _polder(sampling_params).get("slots", Ask.slots)
    if isinstance(slots, bool) or not isinstance(slots, int | float) or not 1 <= slots <= 100:
        raise ConfigError(f"sparse: slots are {slots!r}; write a number from 1 to 100, how many times the budget")
    method = _polder(sampling_params).get("method", Ask.method)
    if method not in METHODS:
        raise ConfigError(f"sparse: unknown method {method!r}; write one of {', '.join(METHODS)}")
    return Ask(budget=parse_budget(budget), slots=float(slots), method=method)


def _polder(sampling_params: Any) -> dict[str, Any]:
    extra = getattr(sampling_params, "extra_args", None) or {}
    transfer = extra.get("kv_transfer_params")
    found = transfer.get("polder") if isinstance(transfer, dict) else None
    return found if isinstance(found, dict) else {}
