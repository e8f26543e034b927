"""One API key for the fleet: who asks without it gets 401.

Open to all are, as with vLLM's own key, what load balancers and scrapers ask (`OPEN`) and CORS preflights.
"""

from __future__ import annotations

import os
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from polder.serve.errors import error_response

__all__ = ["VARIABLE", "EngineGuard", "KeyGuard", "fleet_key"]

OPEN = ("/health", "/ping", "/metrics", "/version", "/polder/status")
VARIABLE = "VLLM_API_KEY"
"""vLLM's own variable."""


def fleet_key(given: str) -> str:
    """The key of the fleet file, else that of the environment. Empty: everybody may ask."""
    return given or os.environ.get(VARIABLE, "")


class KeyGuard:
    """ASGI middleware. An empty key lets everything pass."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        free = not self._key or scope["type"] == "lifespan"
        if not free and scope["type"] == "http":
            free = scope["method"] == "OPTIONS" or scope["path"] in OPEN
        if free or self._fits(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
            return
        words = "the API key is missing or wrong: send `Authorization: Bearer KEY`"
        answer = error_response(401, words, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)

    def _fits(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), self._key)


class EngineGuard(KeyGuard):
    """The same within an engine, by `vllm serve --middleware`: vLLM's own guard leaves /tokenize, /score and others
    open to each user of the machine."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, os.environ.get(VARIABLE, ""))
