"""One endpoint: routed by model, bytes passed through as they come, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from polder.serve.child import ChildStatus
from polder.serve.gateway import make_app
from tests.serve.fakes import FakeEngine, canned_status, fake_broker, running

EVENTS = [f"data: {i}\n\n".encode() for i in range(5)]
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
VLLM_METRICS = (
    "# HELP vllm:running Requests.\n# TYPE vllm:running gauge\n"
    'vllm:running{engine="0",model_name="x"} 3.0\n'
    "# HELP vllm:hits_total Hits.\n# TYPE vllm:hits_total counter\nvllm:hits_total 7.0\n"
)


async def answer(send: Any, body: bytes, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers or []})
    await send({"type": "http.response.body", "body": body})


async def vllm(engine: FakeEngine, scope: Any, receive: Any, send: Any) -> None:
    """Answers as an engine does, by path and by what the request asks for."""
    if scope["path"] == "/v1/models":
        await answer(send, json.dumps({"data": [{"id": engine.name}]}).encode())
    elif scope["path"] == "/metrics":
        await answer(send, VLLM_METRICS.encode())
    else:
        body = engine.requests[-1]["body"]
        wish = json.loads(body).get("wish", "") if body else "error"
        if wish == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            engine.aborted.set()
        elif wish == "break":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ConnectionError("the engine died")
        elif wish == "error":
            await answer(send, b'{"error": {"message": "too long"}}', 400, [(b"content-type", b"application/json")])
        elif wish == "stream":
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            )
            for event in EVENTS:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(0.05)
            await send({"type": "http.response.body", "body": b""})
        elif wish == "stream and hang":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            engine.aborted.set()
        else:
            await answer(send, engine.name.encode(), headers=[(b"x-cookie", b"1"), (b"x-cookie", b"2")])


CHILDREN = [ChildStatus(name="a", state="ready", pid=1, restarts=0, retry_in_s=0.0, last_exit="")]


class Fleet:
    """Engines a and b behind a gateway, c is down."""

    def __init__(self, client: httpx.Client, engine: FakeEngine) -> None:
        self.client, self.engine = client, engine
        self.children = CHILDREN


@contextmanager
def running_fleet(socket: Path | None = None) -> Iterator[Fleet]:
    engines = {name: FakeEngine(name, vllm) for name in ("a", "b")}
    with running(engines["a"]) as a, running(engines["b"]) as b:
        app = make_app({"a": a, "b": b, "c": NOWHERE}, socket=socket, children=lambda: fleet.children)
        with running(app) as base, httpx.Client(base_url=base, timeout=60, trust_env=False) as client:
            fleet = Fleet(client, engines["a"])
            yield fleet


@pytest.fixture(scope="module")
def started() -> Iterator[Fleet]:
    with running_fleet() as fleet:
        yield fleet


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    started.engine.requests.clear()
    started.engine.aborted.clear()
    started.children = CHILDREN
    return started


def test_a_request_goes_to_its_model_byte_for_byte(fleet: Fleet) -> None:
    body = b'{ "model": "a",  "prompt": [1, 2],\n "unknown_to_us": {"x": null}, "\\u00e9": 1e2 }'
    got = fleet.client.post("/v1/completions?x=%2F1", content=body, headers={"authorization": "Bearer k", "X-Id": "7"})
    other = fleet.client.post("/v1/chat/completions", json={"model": "b"})
    assert (got.content, other.content) == (b"a", b"b")
    seen = fleet.engine.requests[-1]
    assert seen["body"] == body
    assert (seen["path"], seen["query"]) == ("/v1/completions", b"x=%2F1")
    assert seen["headers"][b"authorization"] == b"Bearer k"
    assert seen["headers"][b"x-id"] == b"7"
    assert got.headers.get_list("x-cookie") == ["1", "2"]
    assert len(got.headers.get_list("date")) == len(got.headers.get_list("server")) == 1


def test_nothing_is_added_that_the_client_did_not_send(fleet: Fleet) -> None:
    request = fleet.client.build_request("POST", "/v1/completions", json={"model": "a"})
    for name in ("accept-encoding", "user-agent", "accept"):
        del request.headers[name]
    fleet.client.send(request)
    assert set(fleet.engine.requests[-1]["headers"]) == {b"host", b"content-length", b"content-type"}


def test_a_stream_is_passed_on_piece_by_piece(fleet: Fleet) -> None:
    with fleet.client.stream("POST", "/v1/completions", json={"model": "a", "wish": "stream"}) as got:
        assert got.headers["content-type"] == "text/event-stream"
        assert "content-length" not in got.headers
        pieces = list(got.iter_raw())
    assert pieces == EVENTS, "held back or cut otherwise"


def test_a_client_that_goes_away_before_the_answer_aborts_the_engines_work(fleet: Fleet) -> None:
    with pytest.raises(httpx.ReadTimeout):
        fleet.client.post("/v1/completions", json={"model": "a", "wish": "hang"}, timeout=0.3)
    assert fleet.engine.aborted.wait(60)


def test_a_client_that_goes_away_in_mid_answer_aborts_the_engines_work(fleet: Fleet) -> None:
    with fleet.client.stream("POST", "/v1/completions", json={"model": "a", "wish": "stream and hang"}) as got:
        assert next(got.iter_raw()) == EVENTS[0]
    assert fleet.engine.aborted.wait(60)


def test_a_client_that_goes_away_in_mid_body_harms_nobody(fleet: Fleet) -> None:
    import socket

    with socket.create_connection((fleet.client.base_url.host, fleet.client.base_url.port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert fleet.client.post("/v1/completions", json={"model": "a"}).content == b"a"
    assert len(fleet.engine.requests) == 1


def test_an_answer_that_breaks_off_is_not_ended_as_if_it_were_whole(fleet: Fleet) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        fleet.client.post("/v1/completions", json={"model": "a", "wish": "break"})


def test_an_engines_own_error_is_passed_on(fleet: Fleet) -> None:
    got = fleet.client.post("/v1/completions", json={"model": "a", "wish": "error"})
    assert got.status_code == 400
    assert got.json()["error"]["message"] == "too long"


def test_an_unknown_model_is_404_and_lists_the_known(fleet: Fleet) -> None:
    got = fleet.client.post("/v1/completions", json={"model": "zebra"})
    assert got.status_code == 404
    assert got.json()["error"]["type"] == "model_not_found"
    assert "this server has a, b, c" in got.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"model": 3}', b'{"model": null}', b'{"prompt": "x"}', b'{"model": "\xff"}']
)
def test_a_bad_body_is_400(fleet: Fleet, content: bytes) -> None:
    got = fleet.client.post("/v1/completions", content=content)
    assert got.status_code == 400
    assert got.json()["error"]["type"] == "invalid_request_error"


def test_a_body_over_the_limit_is_413(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polder.serve.proxy.MAX_BODY", 1000)
    assert fleet.client.post("/v1/completions", json={"model": "a", "prompt": "x" * 2000}).status_code == 413


def test_a_model_that_is_down_is_503_with_a_time_to_retry(fleet: Fleet) -> None:
    down = ChildStatus(name="c", state="down", pid=None, restarts=2, retry_in_s=8.0, last_exit="ended", ready_in_s=82.3)
    fleet.children = [down]
    got = fleet.client.post("/v1/completions", json={"model": "c"})
    assert got.status_code == 503
    assert got.headers["retry-after"] == "83", "what its last start took is counted"
    assert "model 'c' is not up" in got.json()["error"]["message"]


def test_unknown_paths_are_refused_in_the_same_shape(fleet: Fleet) -> None:
    got = fleet.client.post("/sleep")  # vLLM's own administration is not exposed
    assert got.status_code == 404
    assert "error" in got.json()


def test_models_are_merged_and_a_dead_one_is_left_out(fleet: Fleet) -> None:
    assert [m["id"] for m in fleet.client.get("/v1/models").json()["data"]] == ["a", "b"]


def test_health_is_ok_only_when_every_child_is(fleet: Fleet) -> None:
    assert fleet.client.get("/health").status_code == 200
    down = [*CHILDREN, ChildStatus(name="b", state="down", pid=None, restarts=2, retry_in_s=4.0, last_exit="ended")]
    fleet.children = down
    got = fleet.client.get("/health")
    assert got.status_code == 503
    assert got.json()["children"][1]["restarts"] == 2


def test_a_broker_that_does_not_answer_is_degraded_and_not_down(short_dir: Path) -> None:
    """A listening socket that nobody accepts from is what a stopped broker looks like."""
    with fake_broker(short_dir / "s", canned_status()), running_fleet(short_dir / "s") as fleet:
        fleet.children = [
            *CHILDREN,
            ChildStatus(name="broker", state="ready", pid=2, restarts=0, retry_in_s=0.0, last_exit=""),
        ]
        assert fleet.client.get("/health").json()["status"] == "ok"
    with socket.socket(socket.AF_UNIX) as stopped, running_fleet(short_dir / "t") as fleet:
        stopped.bind(str(short_dir / "t"))
        stopped.listen()
        got = fleet.client.get("/health")
        assert got.status_code == 200
        assert (got.json()["status"], got.json()["broker_answers"]) == ("degraded", False)
        fleet.children = [ChildStatus(name="a", state="starting", pid=1, restarts=1, retry_in_s=0.0, last_exit="")]
        got = fleet.client.get("/health")
        assert (got.status_code, got.json()["status"]) == (503, "down")


def test_metrics_are_the_brokers_and_every_engines(short_dir: Path) -> None:
    with fake_broker(short_dir / "s", canned_status()), running_fleet(short_dir / "s") as fleet:
        text = fleet.client.get("/metrics").text
        status = fleet.client.get("/polder/status").json()
    assert "polder_broker_up 1.0" in text
    assert 'polder_device_held_bytes{device="cpu:0",engine="a",use="kv"}' in text
    assert 'polder_child_ready{child="a"} 1.0' in text
    assert text.count("# TYPE vllm:running gauge") == 1
    assert 'vllm:running{engine="b",exported_engine="0",model_name="x"} 3.0' in text
    assert status["broker"]["generation"] == 7
    assert status["children"][0]["name"] == "a"


def test_a_missing_broker_does_not_take_the_endpoint_down(short_dir: Path) -> None:
    with running_fleet(short_dir / "none") as fleet:
        assert fleet.client.get("/polder/status").json()["broker"] is None
        assert "polder_broker_up 0.0" in fleet.client.get("/metrics").text
        assert fleet.client.post("/v1/completions", json={"model": "a"}).content == b"a"
