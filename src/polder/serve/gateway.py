"""One OpenAI-compatible endpoint for all models: requests go to the engine that their `model` names, bytes pass through.

The gateway reads a request's body once, to find `model`, and forwards the same bytes. Answers, streamed ones too, are passed on as
they come; when the client goes away, the request to the engine is closed, so that vLLM aborts it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from polder.broker import client
from polder.broker.wire import Status
from polder.errors import PolderError
from polder.serve.metrics import merge_engine_metrics, render_status
from polder.serve.supervisor import ChildStatus

__all__ = ["make_app"]

RETRY_AFTER_S = 5
_PER_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "proxy-authorization"}


class _ModelOf(msgspec.Struct):
    """All the gateway reads of a request."""

    model: str = ""


def make_app(
    upstreams: dict[str, str],
    *,
    socket: Path | None,
    children: Callable[[], list[ChildStatus]],
    transport: httpx.AsyncBaseTransport | None = None,
) -> Starlette:
    """An app that routes to `upstreams` (model name -> base URL). `socket`: the broker, for metrics and /polder/status."""
    gateway = _Gateway(upstreams, socket, children, transport)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.client.aclose()

    return Starlette(
        routes=[
            Route("/health", gateway.health),
            Route("/metrics", gateway.metrics),
            Route("/polder/status", gateway.status),
            Route("/v1/models", gateway.models),
            Route("/v1/{path:path}", gateway.forward, methods=["POST"]),
        ],
        lifespan=lifespan,
    )


class _Gateway:
    def __init__(
        self,
        upstreams: dict[str, str],
        socket: Path | None,
        children: Callable[[], list[ChildStatus]],
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._upstreams = upstreams
        self._socket = socket
        self._children = children
        # No time limit on answers: a request may wait for its turn as long as its client does.
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            transport=transport,
        )

    async def forward(self, request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; nginx's number for a client that went away
        try:
            model = msgspec.json.decode(body, type=_ModelOf).model
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            return _error(400, f"the body is not a JSON object with a string `model`: {error}", "invalid_request_error")
        base = self._upstreams.get(model)
        if base is None:
            known = ", ".join(sorted(self._upstreams))
            return _error(404, f"no model {model!r} here; this server has {known}", "model_not_found")
        headers = {
            k: v for k, v in request.headers.items() if k not in _PER_HOP and k not in ("host", "content-length")
        }
        upstream = self.client.build_request("POST", base + request.url.path, content=body, headers=headers)
        try:
            answer = await self.client.send(upstream, stream=True)
        except httpx.TransportError:
            return _error(
                503,
                f"model {model!r} is not up; it is being started or restarted",
                "service_unavailable",
                {"Retry-After": str(RETRY_AFTER_S)},
            )
        return StreamingResponse(
            _pass_on(answer),
            status_code=answer.status_code,
            headers={k: v for k, v in answer.headers.items() if k not in _PER_HOP},
        )

    async def models(self, _: Request) -> Response:
        answers = await asyncio.gather(*(self._get(base + "/v1/models") for base in self._upstreams.values()))
        data = [entry for text in answers if text is not None for entry in json.loads(text)["data"]]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, _: Request) -> Response:
        children = [asdict(child) for child in self._children()]
        healthy = all(child["state"] == "ready" for child in children)
        return JSONResponse({"healthy": healthy, "children": children}, status_code=200 if healthy else 503)

    async def status(self, _: Request) -> Response:
        status = await self._broker_status()
        if status is None:
            return _error(503, "the broker does not answer", "service_unavailable")
        return Response(msgspec.json.encode(status), media_type="application/json")

    async def metrics(self, _: Request) -> Response:
        names = list(self._upstreams)
        status, *texts = await asyncio.gather(
            self._broker_status(), *(self._get(self._upstreams[name] + "/metrics") for name in names)
        )
        own = render_status(status) if isinstance(status, Status) else ""
        engines = merge_engine_metrics(
            (name, text) for name, text in zip(names, texts, strict=True) if isinstance(text, str)
        )
        return PlainTextResponse(own + engines, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _broker_status(self) -> Status | None:
        if self._socket is None:
            return None
        try:
            return await asyncio.to_thread(client.status, self._socket, timeout_s=2.0)
        except PolderError:
            return None

    async def _get(self, url: str) -> str | None:
        try:
            answer = await self.client.get(url, timeout=5.0)
        except httpx.HTTPError:
            return None
        return answer.text if answer.status_code == 200 else None


async def _pass_on(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The engine's bytes as they come; closes the engine's side when the client's has gone (the generator is closed then)."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def _error(code: int, message: str, kind: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status_code=code, headers=headers)
