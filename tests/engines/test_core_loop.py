"""What an engine core's loop tells Polder's side of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.engine import EngineCoreRequestType

from polder.engines.vllm.plugin import _patch_loop


def test_requests_that_come_and_go_are_told_when_vllm_has_handled_them() -> None:
    """Also those that are aborted while the weights sleep: no step follows, so nothing else would tell the broker at once."""
    told: list[str] = []

    class Core:
        def shutdown(self) -> None: ...

    class Process:
        polder = SimpleNamespace(
            **{name: lambda name=name: told.append(name) for name in ("on_wake", "on_request", "on_abort")}
        )

        def _process_engine_step(self) -> bool:
            return True

        def _handle_client_request(self, request_type: Any, request: Any) -> None:
            told.append(request_type.name)

    kinds = EngineCoreRequestType
    _patch_loop(SimpleNamespace(EngineCore=Core, EngineCoreProc=Process, EngineCoreRequestType=kinds))
    for kind in (kinds.ADD, kinds.ABORT, kinds.WAKEUP, kinds.UTILITY):
        Process()._handle_client_request(kind, None)
    assert told == ["ADD", "on_request", "ABORT", "on_abort", "WAKEUP", "on_wake", "UTILITY"]
