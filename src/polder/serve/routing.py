"""Which model a request is for: the `model` of its JSON body or form, a model's own name or that of an adapter.

The body is read only as far as that needs, and never changed: what a value means is the engine's to decide.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Message, Scope

__all__ = ["Catalog", "Unreadable", "named_model"]

ASK_AGAIN_S = 1.0
"""Names that nobody knows make the gateway ask all engines, but not more often than this."""
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class Unreadable(Exception):
    """The body names no model that can be read; the message says why."""


class _Named(msgspec.Struct):
    model: str | None = None


class _Listing(msgspec.Struct):
    data: list[dict[str, Any]]


_strict = msgspec.json.Decoder(_Named)
_listing = msgspec.json.Decoder(_Listing)


async def named_model(scope: Scope, body: bytes) -> str | None:
    """The model that the body names, if any. Raises Unreadable, and HTTPException (400) for a broken form."""
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"").decode("latin-1")
    if not kind.lower().startswith(_FORMS):
        return _of_json(body)

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(scope, replay).form() as form:
        found = form.get("model")
        return found if isinstance(found, str) else None


def _of_json(body: bytes) -> str | None:
    try:
        return _strict.decode(body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    # What vLLM decodes its bodies with takes more: a BOM, UTF-16, NaN, lone surrogates.
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the body is no JSON that can be read: {error}") from error
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(model, str | None):
        raise Unreadable("the body must be a JSON object with a string `model`")
    return model


class Catalog:
    """What the engines list under /v1/models: themselves, and their adapters."""

    def __init__(
        self, upstreams: Mapping[str, str | None], ask_all: Callable[[str], Awaitable[Mapping[str, bytes]]]
    ) -> None:
        """`ask_all(path)`: the answers of all engines that are up, by model."""
        self._upstreams, self._ask_all = upstreams, ask_all
        self._adapters: dict[str, str] = {}
        self._asking = asyncio.Lock()
        self._asked_at = float("-inf")

    async def entries(self) -> list[dict[str, Any]]:
        """All entries, as the engines wrote them."""
        found = []
        adapters = dict(self._adapters)
        for model, text in (await self._ask_all("/v1/models")).items():
            try:
                entries = _listing.decode(text).data
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            found += entries
            names = {name: model for entry in entries if isinstance(name := entry.get("id"), str)}
            adapters = names | {name: base for name, base in adapters.items() if base != model}
        self._adapters = {name: base for name, base in adapters.items() if name not in self._upstreams}
        return found

    async def owner(self, name: str) -> str | None:
        """The model that answers for this name. Adapters of an engine that is down stay known."""
        if name in self._upstreams:
            return name
        if name not in self._adapters:
            async with self._asking:
                if time.monotonic() - self._asked_at >= ASK_AGAIN_S:
                    await self.entries()
                    self._asked_at = time.monotonic()
        return self._adapters.get(name)

    def adapters_changed(self) -> None:
        self._adapters.clear()
        self._asked_at = float("-inf")
