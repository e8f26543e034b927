"""One endpoint: routed by model, bytes passed through as they come, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from polder.serve.gateway import make_app
from polder.serve.supervisor import ChildStatus

EVENTS = [f"data: {i}\n\n".encode() for i in range(5)]


def engine(name: str, aborted: list[str]) -> Starlette:
    """An engine in small."""

    async def completions(request: Request) -> Response:
        body = await request.json()

        async def events() -> AsyncIterator[bytes]:
            try:
                for event in EVENTS:
                    yield event
                    await asyncio.sleep(body.get("pause", 0))
            except asyncio.CancelledError:
                aborted.append(name)
                raise

        if body.get("stream"):
            return StreamingResponse(events(), media_type="text/event-stream")
        return JSONResponse({"served_by": name, "authorization": request.headers.get("authorization"), "body": body})

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name}]})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(
            "# HELP vllm:running Requests.\n# TYPE vllm:running gauge\n"
            f'vllm:running{{model_name="{name}"}} 3.0\n'
            "# HELP vllm:hits Hits.\n# TYPE vllm:hits counter\nvllm:hits_total 7.0\n"
        )

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/metrics", metrics),
        ]
    )


class Upstreams(httpx.AsyncBaseTransport):
    """Sends each request to the app of its host; the host `down` refuses."""

    def __init__(self, aborted: list[str]) -> None:
        self._apps = {name: httpx.ASGITransport(engine(name, aborted)) for name in ("a", "b")}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "down":
            raise httpx.ConnectError("refused")
        return await self._apps[request.url.host].handle_async_request(request)


CHILDREN = [ChildStatus(name="a", state="ready", pid=1, restarts=0, retry_in_s=0.0)]


def client(children: list[ChildStatus] | None = None) -> httpx.AsyncClient:
    app = make_app(
        {"a": "http://a", "b": "http://b", "c": "http://down"},
        socket=Path("/nonexistent/broker"),
        children=lambda: children or CHILDREN,
        transport=Upstreams([]),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://polder")


def call(method: str, path: str, children: list[ChildStatus] | None = None, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client(children) as http:
            return await http.request(method, path, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize("model", ["a", "b"])
def test_a_request_goes_to_its_model_unchanged(model: str) -> None:
    body = {"model": model, "prompt": [1, 2, 3], "unknown_to_us": {"x": None}}
    answer = call("POST", "/v1/completions", json=body, headers={"authorization": "Bearer k"})
    assert answer.json() == {"served_by": model, "authorization": "Bearer k", "body": body}


def test_a_stream_passes_through_byte_for_byte() -> None:
    answer = call("POST", "/v1/completions", json={"model": "a", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content == b"".join(EVENTS)


def test_an_unknown_model_is_404_and_lists_the_known() -> None:
    answer = call("POST", "/v1/completions", json={"model": "zebra"})
    assert answer.status_code == 404
    assert "a, b, c" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": 3}', b""])
def test_a_bad_body_is_400(content: bytes) -> None:
    answer = call("POST", "/v1/completions", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_model_that_is_down_is_503_with_a_time_to_retry() -> None:
    answer = call("POST", "/v1/completions", json={"model": "c"})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def test_models_are_merged_and_a_dead_one_is_left_out() -> None:
    assert [m["id"] for m in call("GET", "/v1/models").json()["data"]] == ["a", "b"]


def test_health_is_ok_only_when_every_child_is() -> None:
    assert call("GET", "/health").status_code == 200
    down = [*CHILDREN, ChildStatus(name="b", state="down", pid=None, restarts=2, retry_in_s=4.0)]
    answer = call("GET", "/health", children=down)
    assert answer.status_code == 503
    assert answer.json()["children"][1]["restarts"] == 2


def test_metrics_of_all_engines_are_one_valid_text() -> None:
    text = call("GET", "/metrics").text
    assert text.count("# TYPE vllm:running gauge") == 1
    assert 'vllm:running{engine="a",model_name="a"} 3.0' in text
    assert 'vllm:hits_total{engine="b"} 7.0' in text


def test_a_missing_broker_does_not_take_the_endpoint_down() -> None:
    assert call("GET", "/polder/status").status_code == 503
    assert json.loads(call("POST", "/v1/completions", json={"model": "a"}).content)["served_by"] == "a"
