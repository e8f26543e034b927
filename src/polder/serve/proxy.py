"""The path of a request through the gateway: read the body once, find its model (routing.py), pass bytes on.

Any path and method: what names a model goes to that model's engine; what has no body is put to the engines in turn
until one knows it. In a fleet of one model all goes to that one, as if the client asked vLLM itself.

Guarantees for clients:
  * Body and answer are passed on byte for byte. The pieces of a stream go out as they come in.
  * When the client goes away, at any moment, the request to the engine is closed, so that vLLM aborts it.
  * An answer that the engine breaks off is broken off here too. It never ends as if it were whole.
  * A request is sent a second time only when it was sent on a connection that had been idle, and nothing came back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import httpx
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from polder.serve.errors import error_response
from polder.serve.routing import Catalog, Unreadable, named_model

__all__ = ["MAX_BODY", "Proxy"]

logger = logging.getLogger("polder.gateway")

MAX_BODY = 256 << 20
"""The largest body of a request in bytes, images included."""

API = ("/v1/", "/v2/", "/inference/", "/cohere/", "/version")
"""Requests without a body are passed on below these paths only: elsewhere vLLM has its administration."""

# Headers of one connection only (RFC 9110, 7.6.1); length and date are made anew.
_ANSWER_ONLY = {b"date", b"server"}
_PER_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}


class _TooLarge(Exception):
    pass


class Proxy:
    """An ASGI app for all requests that the gateway does not answer itself."""

    def __init__(
        self,
        upstreams: Mapping[str, str | None],
        catalog: Catalog,
        http: httpx.AsyncClient,
        fresh: httpx.AsyncClient,
        retry_after_s: Callable[[str], int],
        engine_key: str = "",
    ) -> None:
        """`upstreams`: model name -> base URL, None while it is down; it may change at any time.

        `fresh`: a client that keeps no connections. `retry_after_s(model)`: the Retry-After of a model that is down.
        `engine_key`: what the engines want in place of the client's key; empty: what the client sends.
        """
        self._upstreams, self._catalog, self._http, self._fresh = upstreams, catalog, http, fresh
        self._retry_after_s = retry_after_s
        self._timeouts = http.timeout.as_dict()
        # The gateway itself answers what is asked across origins.
        self._dropped = {b"content-length", b"expect", b"proxy-authorization", b"origin"}
        self._added: list[tuple[bytes, bytes]] = []
        if engine_key:
            self._dropped.add(b"authorization")
            self._added.append((b"authorization", b"Bearer " + engine_key.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(receive)
        except _TooLarge:
            message = f"the body is over {MAX_BODY >> 20} MiB"
            await error_response(413, message, "invalid_request_error")(scope, receive, send)
            return
        if body is None:
            return
        names = await self._route(scope, body)
        if isinstance(names, JSONResponse):
            await names(scope, receive, send)
            return
        forward = asyncio.ensure_future(self._forward(names, body, scope, receive, send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({forward, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not forward.done():
                forward.cancel()
            await asyncio.gather(forward, gone, return_exceptions=True)
        if not forward.cancelled():
            forward.result()

    async def _route(self, scope: Scope, body: bytes) -> Sequence[str] | JSONResponse:
        """The models that may answer, to be asked in this order, or an error answer."""
        models = list(self._upstreams)
        known = ", ".join(sorted(models))
        if not body:
            if not scope["path"].startswith(API):
                raise HTTPException(404)
            return models  # a stored response, for example, is known to one of them
        if len(models) == 1:
            return models  # as vLLM: it checks the name itself
        try:
            name = await named_model(scope, body)
        except Unreadable as error:
            return error_response(400, f"{error}; this server has {known}", "invalid_request_error")
        if not name:
            return error_response(400, f"`model` is missing; this server has {known}", "invalid_request_error")
        model = await self._catalog.owner(name)
        if model is None:
            return error_response(404, f"no model {name!r} here; this server has {known}", "model_not_found")
        return [model]

    async def _forward(self, names: Sequence[str], body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the first answer on that is no 404, else a 404."""
        answer, error = None, error_response(503, "no model is here", "service_unavailable")
        model = ""
        try:
            for model in names:
                try:
                    other = await self._ask(model, body, scope)
                except httpx.TransportError as fault:
                    error = self._unavailable(model, fault)
                    continue
                if answer is not None:
                    await answer.aclose()
                answer = other
                if answer.status_code != 404:
                    break
            if answer is None:
                await error(scope, receive, send)
                return
            headers = _kept(answer.headers.raw, _ANSWER_ONLY)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.TransportError as fault:
            # Returning without the last piece makes the server cut the connection.
            logger.warning("model %s broke an answer off: %s", model, fault or type(fault).__name__)
        finally:
            if answer is not None:
                await answer.aclose()
            if scope["path"].rstrip("/").endswith("load_lora_adapter"):
                self._catalog.adapters_changed()

    async def _ask(self, model: str, body: bytes, scope: Scope) -> httpx.Response:
        """The engine's answer, its body not read yet. Raises TransportError."""
        upstream = self._upstreams.get(model)
        if upstream is None:
            raise httpx.ConnectError("not up")
        query = scope["query_string"].decode("latin-1")
        url = upstream + (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        url += f"?{query}" if query else ""
        # The host, too, stays the client's: redirects name it.
        headers = _kept(scope["headers"], self._dropped) + self._added
        connected = False

        async def trace(event: str, _: object) -> None:
            nonlocal connected
            connected |= event == "connection.connect_tcp.started"

        def request() -> httpx.Request:
            # Not the client's build_request, which would add headers such as accept-encoding and cookies.
            extensions = {"timeout": self._timeouts, "trace": trace}
            return httpx.Request(scope["method"], url, headers=headers, content=body, extensions=extensions)

        try:
            return await self._http.send(request(), stream=True)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            if connected:
                raise
        # The engine has closed an idle connection just as this request was sent on it.
        return await self._fresh.send(request(), stream=True)

    def _unavailable(self, model: str, error: httpx.TransportError) -> JSONResponse:
        up = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
        what = "went down while it worked on this request" if up else "is not up: it is being started or restarted"
        again = {"Retry-After": str(self._retry_after_s(model))}
        return error_response(503, f"model {model!r} {what}", "service_unavailable", again)


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None when the client goes away before it is complete."""
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MAX_BODY:
            raise _TooLarge
        if not message.get("more_body"):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _kept(headers: list[tuple[bytes, bytes]], dropped: set[bytes]) -> list[tuple[bytes, bytes]]:
    """The headers of the message without those of its connection, names in lower case, in their order."""
    named = [(name.lower(), value) for name, value in headers]
    listed = {word.strip() for name, value in named if name == b"connection" for word in value.lower().split(b",")}
    return [(name, value) for name, value in named if name not in _PER_HOP | dropped | listed]
