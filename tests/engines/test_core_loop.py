"""What an engine core's loop tells Polder's side of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.engine import EngineCoreRequestType

from polder.engines.vllm.core.taps import handle_client_request
from polder.engines.vllm.hooks import around


def test_requests_that_come_and_go_are_told_when_vllm_has_handled_them() -> None:
    """Also those that are aborted while the weights sleep: no step follows, so nothing else would tell the broker at once."""
    told: list[str] = []

    class Process:
        polder = SimpleNamespace(
            **{name: lambda name=name: told.append(name) for name in ("on_wake", "on_request", "on_abort")}
        )

        def _handle_client_request(self, request_type: Any, request: Any) -> None:
            told.append(request_type.name)

    kinds = EngineCoreRequestType
    handle = around(Process._handle_client_request, handle_client_request)
    for kind in (kinds.ADD, kinds.ABORT, kinds.WAKEUP, kinds.UTILITY):
        handle(Process(), kind, None)
    assert told == ["ADD", "on_request", "ABORT", "on_abort", "WAKEUP", "on_wake", "UTILITY"]
