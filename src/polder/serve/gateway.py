"""One OpenAI-compatible endpoint for all models. A request goes to the engine that its `model` names, byte for byte.

| route              | answer                                                                                       |
|--------------------|----------------------------------------------------------------------------------------------|
| POST /v1/*         | the engine's, byte for byte (proxy.py)                                                       |
| GET /v1/models     | the models of all engines that are up                                                        |
| GET /health        | 200 while every model serves, else 503; JSON: `status` is "ok", "degraded" or "down"         |
| GET /metrics       | Prometheus: Polder's own, then every vLLM's with `engine` added (metrics.py)                 |
| GET /polder/status | JSON: the broker's status (null when it does not answer) and the children                    |

"degraded": every model serves, but the broker does not answer. Requests are answered as before. No memory moves between
models, and a model whose weights are away cannot get them back. It is a 200, because a load balancer should go on
sending requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from polder.broker import client
from polder.broker.wire import Status
from polder.errors import PolderError
from polder.serve.metrics import merge, render
from polder.serve.proxy import Proxy, error_response
from polder.serve.supervisor import BROKER, ChildStatus, FleetStatus

__all__ = ["make_app"]

# Shorter than the 5 s after which vLLM's server closes an idle connection, so no request meets one that is being
# closed.
KEEPALIVE_S = 4.0
BROKER_S = 1.0  # time limit of the broker's answer to a health check
ASIDE_S = 5.0  # time limit of the gateway's own requests to engines: models, metrics


def make_app(
    upstreams: Mapping[str, str],
    *,
    socket: Path | None,
    children: Callable[[], Sequence[ChildStatus]],
    transport: httpx.AsyncBaseTransport | None = None,
) -> Starlette:
    """An app that routes to `upstreams` (model name -> base URL).

    `socket`: the broker's, for /metrics and /polder/status. `children`: the supervised processes, if there are any.
    """
    http = httpx.AsyncClient(
        # No time limit for answers: a request may wait as long as its client does.
        timeout=httpx.Timeout(None, connect=5.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=KEEPALIVE_S),
        transport=transport,
        trust_env=False,  # engines are on loopback, never behind a proxy
    )
    gateway = _Gateway(upstreams, socket, children, http)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await http.aclose()

    return Starlette(
        routes=[
            Route("/health", gateway.health),
            Route("/metrics", gateway.metrics),
            Route("/polder/status", gateway.status),
            Route("/v1/models", gateway.models),
            Route("/v1/{path:path}", Proxy(upstreams, http, gateway.retry_after_s), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )


class _Gateway:
    def __init__(
        self,
        upstreams: Mapping[str, str],
        socket: Path | None,
        children: Callable[[], Sequence[ChildStatus]],
        http: httpx.AsyncClient,
    ) -> None:
        self._upstreams, self._socket, self._children, self._http = upstreams, socket, children, http

    def retry_after_s(self, model: str) -> int:
        """Seconds after which to ask again for a model that is down: its back-off and some time to load."""
        waits = [child.retry_in_s for child in self._children() if child.name == model]
        return 5 + round(max(waits, default=0.0))

    async def models(self, _: Request) -> Response:
        texts = await self._from_all("/v1/models")
        data = [entry for text in texts.values() for entry in json.loads(text)["data"]]
        return JSONResponse({"object": "list", "data": data})

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
        text = merge([("", render(status, self._children())), *texts.items()])
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _broker_status(self, timeout_s: float = 2.0) -> Status | None:
        if self._socket is None:
            return None
        try:
            return await asyncio.to_thread(client.status, self._socket, timeout_s=timeout_s)
        except PolderError:
            return None

    async def _from_all(self, path: str) -> dict[str, str]:
        """The answers of all engines that are up, by model."""
        names = list(self._upstreams)
        texts = await asyncio.gather(*(self._get(self._upstreams[name] + path) for name in names))
        return {name: text for name, text in zip(names, texts, strict=True) if text is not None}

    async def _get(self, url: str) -> str | None:
        try:
            answer = await self._http.get(url, timeout=ASIDE_S)
        except httpx.HTTPError:
            return None
        return answer.text if answer.status_code == 200 else None


async def _refused(_: Request, error: Exception) -> Response:
    """Answers unknown paths and methods, in OpenAI's shape like every other error."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: this server answers POST /v1/*, GET /v1/models, /health, /metrics and /polder/status"
    return error_response(error.status_code, message, "invalid_request_error")
