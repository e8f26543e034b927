"""One OpenAI-compatible endpoint for all models. A request goes to the engine that its `model` names, byte for byte.

| route               | answer                                                                                      |
|---------------------|---------------------------------------------------------------------------------------------|
| GET /v1/models      | the models of all engines that are up, and their adapters                                   |
| GET /v1/models/{id} | one of them                                                                                 |
| /health, /ping      | 200 while every model serves, else 503; JSON: `status` is "ok", "degraded" or "down"        |
| GET /metrics        | Prometheus: Polder's own, then every vLLM's with `engine` added (metrics.py)                |
| GET /polder/status  | JSON: the broker's status (null when it does not answer) and the children                   |
| all else            | the engine's, byte for byte (proxy.py)                                                      |
| a WebSocket         | refused: /v1/realtime names its model only after the connection is made                     |

"degraded": every model serves, but the broker does not answer. Requests are answered as before. No memory moves between
models, and a model whose weights are away cannot get them back. It is a 200, because a load balancer should go on
sending requests.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from polder.broker import client
from polder.broker.wire import Status
from polder.errors import PolderError
from polder.serve.child import ChildStatus
from polder.serve.errors import error_response
from polder.serve.keys import KeyGuard
from polder.serve.metrics import merge, render
from polder.serve.proxy import Proxy
from polder.serve.routing import Catalog
from polder.serve.supervisor import BROKER, FleetStatus

__all__ = ["make_app"]

# Shorter than the 5 s after which vLLM's server closes an idle connection, so no request meets one that is being
# closed.
KEEPALIVE_S = 4.0
BROKER_S = 1.0  # time limit of the broker's answer to a health check
ASIDE_S = 5.0  # time limit of the gateway's own requests to engines: models, metrics
UNKNOWN_S = 5  # Retry-After of a model of which nothing is known


def make_app(
    upstreams: Mapping[str, str | None],
    *,
    socket: Path | None,
    children: Callable[[], Sequence[ChildStatus]],
    key: str = "",
    engine_key: str = "",
    allowed_origins: Sequence[str] = (),
) -> Starlette:
    """An app that routes to `upstreams` (model name -> base URL, None while it is down; it may change at any time).

    `socket`: the broker's, for /metrics and /polder/status. `children`: the supervised processes, if there are any.
    `key`: what clients must send (empty: nothing). `engine_key`: what the engines want. `allowed_origins`: web pages
    that may ask; ("*",) for all.
    """
    http, fresh = _client(kept=256), _client(kept=0)
    gateway = _Gateway(upstreams, socket, children, http, engine_key)
    proxy = Proxy(upstreams, gateway.catalog, http, fresh, gateway.retry_after_s, engine_key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await http.aclose()
        await fresh.aclose()

    return Starlette(
        routes=[
            Route("/health", gateway.health),
            Route("/ping", gateway.health, methods=["GET", "POST"]),
            Route("/metrics", gateway.metrics),
            Route("/polder/status", gateway.status),
            Route("/v1/models", gateway.models),
            Route("/v1/models/{name:path}", gateway.model),
            Route("/{path:path}", proxy),
            WebSocketRoute("/{path:path}", _no_websocket),
        ],
        middleware=[
            Middleware(CORSMiddleware, allow_origins=list(allowed_origins), allow_methods=["*"], allow_headers=["*"]),
            Middleware(KeyGuard, key=key),
        ],
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )


def _client(*, kept: int) -> httpx.AsyncClient:
    """A client for engines that keeps so many idle connections."""
    return httpx.AsyncClient(
        # No time limit for answers: a request may wait as long as its client does.
        timeout=httpx.Timeout(None, connect=5.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=kept, keepalive_expiry=KEEPALIVE_S),
        trust_env=False,  # engines are on loopback, never behind a proxy
    )


class _Gateway:
    def __init__(
        self,
        upstreams: Mapping[str, str | None],
        socket: Path | None,
        children: Callable[[], Sequence[ChildStatus]],
        http: httpx.AsyncClient,
        engine_key: str,
    ) -> None:
        self._upstreams, self._socket, self._children, self._http = upstreams, socket, children, http
        self._headers = {"Authorization": f"Bearer {engine_key}"} if engine_key else {}
        self.catalog = Catalog(upstreams, self._from_all)

    def retry_after_s(self, model: str) -> int:
        """Seconds after which to ask again for a model that is down."""
        found = [child.ready_in_s for child in self._children() if child.name == model]
        return max(1, math.ceil(found[0])) if found else UNKNOWN_S

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": await self.catalog.entries()})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"].rstrip("/")
        entries = await self.catalog.entries()
        found = [entry for entry in entries if entry.get("id") == name]
        if found:
            return JSONResponse(found[0])
        if not name:
            return JSONResponse({"object": "list", "data": entries})
        known = ", ".join(str(entry.get("id")) for entry in entries)
        return error_response(404, f"no model {name!r} here; this server has {known}", "model_not_found")

    async def health(self, _: Request) -> Response:
        broker = self._socket is None or await self._broker_status(BROKER_S) is not None
        children = self._children()
        serving = all(child.state == "ready" for child in children if child.name != BROKER)
        body = {
            "status": "down" if not serving else "ok" if broker else "degraded",
            "healthy": serving,
            "broker_answers": broker,
            "children": [asdict(child) for child in children],
        }
        return JSONResponse(body, status_code=200 if serving else 503)

    async def status(self, _: Request) -> Response:
        found = FleetStatus(broker=await self._broker_status(), children=list(self._children()))
        return Response(msgspec.json.encode(found), media_type="application/json")

    async def metrics(self, _: Request) -> Response:
        status, texts = await asyncio.gather(self._broker_status(), self._from_all("/metrics"))
        engines = [(name, text.decode(errors="replace")) for name, text in texts.items()]
        text = merge([("", render(status, self._children())), *engines])
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _broker_status(self, timeout_s: float = 2.0) -> Status | None:
        if self._socket is None:
            return None
        try:
            return await asyncio.to_thread(client.status, self._socket, timeout_s=timeout_s)
        except PolderError:
            return None

    async def _from_all(self, path: str) -> dict[str, bytes]:
        """The answers of all engines that are up, by model."""
        urls = {name: url + path for name, url in self._upstreams.items() if url is not None}
        texts = await asyncio.gather(*(self._get(url) for url in urls.values()))
        return {name: text for name, text in zip(urls, texts, strict=True) if text is not None}

    async def _get(self, url: str) -> bytes | None:
        try:
            answer = await self._http.get(url, timeout=ASIDE_S, headers=self._headers)
        except httpx.HTTPError:
            return None
        return answer.content if answer.status_code == 200 else None


async def _no_websocket(asked: WebSocket) -> None:
    message = f"a fleet's endpoint has no WebSockets: ask a `vllm serve` of its own for {asked.url.path}"
    await asked.send_denial_response(error_response(501, message, "not_supported"))


async def _refused(_: Request, error: Exception) -> Response:
    """Answers what nobody is asked for, in OpenAI's shape like every other error."""
    assert isinstance(error, HTTPException)
    message = (
        f"{error.detail}: send a body that names a `model`, or ask /v1/*, /version, /health, /metrics, /polder/status"
    )
    return error_response(error.status_code, message, "invalid_request_error")
