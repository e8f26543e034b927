"""The path of a request through the gateway: read the body once, find `model`, pass bytes both ways.

Guarantees for clients:
  * Body and answer are passed on byte for byte. The pieces of a stream go out as they come in.
  * When the client goes away, at any moment, the request to the engine is closed, so that vLLM aborts it.
  * An answer that the engine breaks off is broken off here too. It never ends as if it were whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import httpx
import msgspec
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

__all__ = ["MAX_BODY", "Proxy", "error_response"]

logger = logging.getLogger("polder.gateway")

MAX_BODY = 256 << 20
"""The largest body of a request in bytes, images included."""

# Headers of one connection only (RFC 9110, 7.6.1); host, length and date are made anew.
_REQUEST_ONLY = {b"host", b"content-length", b"expect", b"proxy-authorization"}
_ANSWER_ONLY = {b"date", b"server"}
_PER_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}


class _Routed(msgspec.Struct):
    """What the gateway reads of a request. Other fields are only checked to be JSON."""

    model: str = ""


_decoder = msgspec.json.Decoder(_Routed)


class _TooLarge(Exception):
    pass


class Proxy:
    """An ASGI app for POST requests with a JSON body."""

    def __init__(
        self, upstreams: Mapping[str, str], http: httpx.AsyncClient, retry_after_s: Callable[[str], int]
    ) -> None:
        """`upstreams`: model name -> base URL. `retry_after_s(model)`: the Retry-After of a model that is down."""
        self._upstreams, self._http, self._retry_after_s = upstreams, http, retry_after_s
        self._extensions = {"timeout": http.timeout.as_dict()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(receive)
        except _TooLarge:
            message = f"the body is over {MAX_BODY >> 20} MiB"
            await error_response(413, message, "invalid_request_error")(scope, receive, send)
            return
        if body is None:
            return
        routed = self._route(body)
        if isinstance(routed, JSONResponse):
            await routed(scope, receive, send)
            return
        forward = asyncio.ensure_future(self._forward(routed, body, scope, receive, send))
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

    def _route(self, body: bytes) -> str | JSONResponse:
        """The model that the body names, or an error answer."""
        try:
            model = _decoder.decode(body).model
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"the body must be a JSON object with a string `model`: {error}"
            return error_response(400, message, "invalid_request_error")
        known = ", ".join(sorted(self._upstreams))
        if not model and len(self._upstreams) == 1:
            return next(iter(self._upstreams))  # as vLLM does
        if not model:
            return error_response(400, f"`model` is missing; this server has {known}", "invalid_request_error")
        if model not in self._upstreams:
            return error_response(404, f"no model {model!r} here; this server has {known}", "model_not_found")
        return model

    async def _forward(self, model: str, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope["query_string"].decode("ascii")
        url = self._upstreams[model] + (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        url += f"?{query}" if query else ""
        # Not the client's build_request, which would add headers such as accept-encoding and cookies.
        request = httpx.Request(
            "POST", url, headers=_kept(scope["headers"], _REQUEST_ONLY), content=body, extensions=self._extensions
        )
        try:
            answer = await self._http.send(request, stream=True)
        except httpx.TransportError as error:
            up = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
            what = "went down while it worked on this request" if up else "is not up: it is being started or restarted"
            again = {"Retry-After": str(self._retry_after_s(model))}
            response = error_response(503, f"model {model!r} {what}", "service_unavailable", again)
            await response(scope, receive, send)
            return
        try:
            headers = _kept(answer.headers.raw, _ANSWER_ONLY)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.TransportError as error:
            # Returning without the last piece makes the server cut the connection.
            logger.warning("model %s broke an answer off: %s", model, error or type(error).__name__)
        finally:
            await answer.aclose()


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


def error_response(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)
