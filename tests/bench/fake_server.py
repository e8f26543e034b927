"""A completions server without a model: streams tokens at a fixed pace, and remembers when it was asked what."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass(kw_only=True)
class FakeEngine:
    """Behaviour to choose, and what came in."""

    first_token_s: float = 0.0
    token_s: float = 0.0
    fail_with: int = 0
    """HTTP status of every answer, 0: answer well."""
    cut_after: int = 10**9
    """Tokens after which a stream ends without the rest."""
    cached_tokens: int = 0
    longest: int = 10**9
    """A prompt with its answer that is longer is refused."""
    asked: list[dict[str, object]] = field(default_factory=list)
    asked_at: list[float] = field(default_factory=list)
    url: str = ""
    model: str = "A"

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.asked_at.append(time.perf_counter())
        if self.fail_with or len(body["prompt"]) + body["max_tokens"] > self.longest:
            return JSONResponse({"error": {"message": "no"}}, status_code=self.fail_with or 400)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _events(self, body: dict[str, object]) -> AsyncIterator[bytes]:
        count, prompt = body["max_tokens"], body["prompt"]
        assert isinstance(count, int)
        assert isinstance(prompt, list)
        await asyncio.sleep(self.first_token_s)
        for number in range(min(count, self.cut_after)):
            if number:
                await asyncio.sleep(self.token_s)
            yield _event({"id": "x", "choices": [{"index": 0, "text": "", "token_ids": [100 + number]}]})
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        yield _event({"id": "x", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def _event(data: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@contextmanager
def serving(engine: FakeEngine) -> Iterator[FakeEngine]:
    """Serves `engine` on a port of its own, in a thread."""
    completions = Route("/v1/completions", engine.complete, methods=["POST"])
    app = Starlette(routes=[completions, Route("/v1/models", engine.models)])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    engine.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.should_exit = True
        thread.join(timeout=60)
