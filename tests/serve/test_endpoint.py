"""The endpoint is vLLM's own, for several models: its routes, its adapters, its key, and bytes that it alone judges."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from polder.serve.child import ChildStatus
from polder.serve.gateway import make_app
from polder.serve.keys import EngineGuard
from tests.serve.fakes import FakeEngine, running

NOWHERE = "http://127.0.0.1:9"  # nobody listens there
MODELS = {"a": ["a", "sql"], "b": ["b"]}
"""What each engine lists: a has an adapter."""


async def vllm(engine: FakeEngine, scope: Any, receive: Any, send: Any) -> None:
    """Says what it got. Redirects a trailing slash, knows one response and one stored answer a model, as vLLM does."""
    seen = engine.requests[-1]
    path, status, headers = scope["path"], 200, [(b"content-type", b"application/json")]
    body: Any = {"engine": engine.name, "path": path, "method": scope["method"]}
    if path == "/v1/models":
        body = {"data": [{"id": name} for name in MODELS[engine.name]] + [{"id": name} for name in engine.adapters]}
    elif path == "/v1/load_lora_adapter":
        engine.adapters.append(json.loads(seen["body"])["lora_name"])
    elif path.startswith("/v1/responses/") and path.split("/")[3] != f"resp_{engine.name}":
        status = 404
    elif path != "/" and path.endswith("/"):
        status = 307
        headers.append((b"location", b"http://" + seen["headers"][b"host"] + path.rstrip("/").encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


class Endpoint:
    def __init__(self, client: httpx.Client, engines: dict[str, FakeEngine]) -> None:
        self.client, self.engines = client, engines

    def seen(self, name: str) -> dict[str, Any]:
        return self.engines[name].requests[-1]


@contextmanager
def endpoint(*names: str, down: tuple[str, ...] = (), **options: Any) -> Iterator[Endpoint]:
    engines = {name: FakeEngine(name, vllm) for name in names}
    with ExitStack() as stack:
        urls: dict[str, str | None] = {name: stack.enter_context(running(engine)) for name, engine in engines.items()}
        urls |= dict.fromkeys(down)
        app = make_app(urls, socket=None, children=list, **options)
        base = stack.enter_context(running(app))
        client = stack.enter_context(httpx.Client(base_url=base, timeout=60, trust_env=False))
        yield Endpoint(client, engines)


@pytest.fixture(scope="module")
def two() -> Iterator[Endpoint]:
    with endpoint("a", "b", down=("c",)) as found:
        yield found


@pytest.fixture(scope="module")
def one() -> Iterator[Endpoint]:
    with endpoint("a") as found:
        yield found


@pytest.mark.parametrize(
    "path",
    ["/tokenize", "/detokenize", "/pooling", "/score", "/v2/rerank", "/classify", "/v1/embeddings", "/of-a-plugin"],
)
def test_any_route_whose_body_names_a_model_is_that_engines(two: Endpoint, path: str) -> None:
    assert two.client.post(path, json={"model": "b", "input": "x"}).json() == {
        "engine": "b",
        "path": path,
        "method": "POST",
    }


def test_a_form_names_its_model_in_a_field(two: Endpoint) -> None:
    sound = bytes(range(256)) * 40
    got = two.client.post("/v1/audio/transcriptions", data={"model": "b"}, files={"file": ("x.wav", sound)})
    assert got.json()["engine"] == "b"
    assert sound in two.seen("b")["body"]
    assert two.client.post("/v1/audio/transcriptions", data={"x": "b"}, files={"file": b"1"}).status_code == 400
    broken = two.client.post("/v1/audio/transcriptions", content=b"x", headers={"content-type": "multipart/form-data"})
    assert broken.status_code == 400
    assert "error" in broken.json()


def test_what_names_no_model_is_put_to_the_engines_in_turn(two: Endpoint) -> None:
    assert two.client.get("/v1/responses/resp_b").json()["engine"] == "b"
    assert two.client.post("/v1/responses/resp_b/cancel").json()["engine"] == "b"
    assert two.client.get("/v1/responses/resp_of_nobody").status_code == 404
    assert two.client.get("/version").json()["engine"] == "a"


def test_administration_without_a_model_is_nobodys(two: Endpoint, one: Endpoint) -> None:
    for found in (two, one):
        for path in ("/sleep?level=2", "/pause", "/wake_up", "/start_profile"):
            assert found.client.post(path).status_code == 404
        assert found.client.get("/server_info").status_code == 404


def test_a_model_by_its_id(two: Endpoint) -> None:
    assert two.client.get("/v1/models/sql").json() == {"id": "sql"}
    assert two.client.get("/v1/models/").json() == two.client.get("/v1/models").json()
    got = two.client.get("/v1/models/org/none")
    assert (got.status_code, got.json()["error"]["type"]) == (404, "model_not_found")


def test_an_adapter_is_its_base_models_also_when_it_comes_later() -> None:
    with endpoint("a", "b") as found:
        assert found.client.post("/v1/completions", json={"model": "sql"}).json()["engine"] == "a"
        assert found.client.post("/v1/completions", json={"model": "later"}).status_code == 404
        loaded = found.client.post(
            "/v1/load_lora_adapter", json={"model": "b", "lora_name": "later", "lora_path": "/x"}
        )
        assert loaded.json()["engine"] == "b"
        assert found.client.post("/v1/completions", json={"model": "later"}).json()["engine"] == "b"
        assert [entry["id"] for entry in found.client.get("/v1/models").json()["data"]] == ["a", "sql", "b", "later"]


def test_names_that_nobody_has_ask_the_engines_once_a_second() -> None:
    with endpoint("a", "b") as found:
        for number in range(20):
            assert found.client.post("/v1/completions", json={"model": f"no-{number}"}).status_code == 404
        assert len(found.engines["a"].requests) <= 2


def test_in_a_fleet_of_one_model_the_engine_judges_names_and_bodies(one: Endpoint) -> None:
    for body in (b'{"model": "of a resolver"}', b'{"model": 3}', b"{", b"\xff"):
        assert one.client.post("/v1/completions", content=body).json()["engine"] == "a"
        assert one.seen("a")["body"] == body


@pytest.mark.parametrize(
    "body",
    [
        b'\xef\xbb\xbf{"model": "b"}',
        '{"model": "b"}'.encode("utf-16"),
        b'{"x": NaN, "y": -Infinity, "model": "b"}',
        b'{"x": "\\ud800", "model": "b"}',
        b'{"model": "a", "model": "b"}',
    ],
)
def test_what_vllm_can_read_is_passed_to_it_byte_for_byte(two: Endpoint, body: bytes) -> None:
    assert two.client.post("/v1/completions", content=body).json()["engine"] == "b"
    assert two.seen("b")["body"] == body


@pytest.mark.parametrize(
    "body", [b'{"x": %s, "model": "b"}' % (b"[" * 50_000 + b"]" * 50_000), b"[" * 50_000, b'{"model": "\\ud800"}']
)
def test_what_nobody_can_read_is_refused_and_no_fault(two: Endpoint, body: bytes) -> None:
    got = two.client.post("/v1/completions", content=body)
    assert got.status_code in (400, 404)
    assert got.json()["error"]["message"]


def test_a_redirect_names_the_address_that_the_client_knows(two: Endpoint) -> None:
    got = two.client.post("/v1/chat/completions/", json={"model": "b"})
    assert got.status_code == 307
    assert got.headers["location"] == f"{str(two.client.base_url).rstrip('/')}/v1/chat/completions"
    assert two.client.post("/v1/chat/completions/", json={"model": "b"}, follow_redirects=True).status_code == 200


def test_a_websocket_is_refused_with_words(two: Endpoint) -> None:
    """What names its model after the connection is made cannot be routed. httpx speaks no WebSocket; this is its handshake."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    got = two.client.get("/v1/realtime", headers=upgrade | {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="})
    assert (got.status_code, got.json()["error"]["type"]) == (501, "not_supported")
    assert "`vllm serve` of its own for /v1/realtime" in got.json()["error"]["message"]


# ---------------------------------------------------------------- who may ask


def test_one_key_for_the_fleet_and_another_for_its_engines() -> None:
    with endpoint("a", "b", key="s3cret", engine_key="inner") as found:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            for path in ("/v1/models", "/v1/models/a", "/v1/responses/resp_a"):
                assert found.client.get(path, headers=headers).status_code == 401
            got = found.client.post("/tokenize", json={"model": "a"}, headers=headers)
            assert (got.status_code, got.json()["error"]["type"]) == (401, "invalid_api_key")
        assert not found.engines["a"].requests
        for path in ("/health", "/ping", "/metrics", "/version"):
            assert found.client.get(path).status_code == 200
        found.client.headers["Authorization"] = "Bearer s3cret"
        assert [entry["id"] for entry in found.client.get("/v1/models").json()["data"]] == ["a", "sql", "b"]
        assert found.client.post("/v1/completions", json={"model": "sql"}).json()["engine"] == "a"
        assert {seen["headers"][b"authorization"] for seen in found.engines["a"].requests} == {b"Bearer inner"}


def test_an_engine_lets_nobody_past_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "inner")
    with running(EngineGuard(FakeEngine("a", vllm))) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.post("/tokenize", json={"model": "a"}).status_code == 401
        assert client.post("/tokenize", json={"model": "a"}, headers={"Authorization": "Bearer inner"}).is_success
        assert client.get("/health").is_success


def test_web_pages_may_ask_where_they_are_allowed_as_with_vllm() -> None:
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    with endpoint("a", key="k", allowed_origins=("*",)) as found:
        got = found.client.options("/v1/chat/completions", headers=asked)
        assert (got.status_code, got.headers["access-control-allow-origin"]) == (200, "*")
        key = {"Authorization": "Bearer k"}
        got = found.client.post("/v1/completions", json={"model": "a"}, headers={"Origin": "http://page"} | key)
        assert got.headers.get_list("access-control-allow-origin") == ["*"]
        assert b"origin" not in found.seen("a")["headers"], "the engine would answer it a second time"
        got = found.client.get("/v1/models", headers={"Origin": "http://page"})
        assert (got.status_code, got.headers["access-control-allow-origin"]) == (401, "*")
    with endpoint("a") as found:
        got = found.client.options("/v1/chat/completions", headers=asked)
        assert (got.status_code, "access-control-allow-origin" in got.headers) == (400, False)


# ---------------------------------------------------------------- connections to engines


class OneAnswerEach:
    """An engine that keeps each connection for one answer and closes it when the next request has arrived."""

    def __init__(self, answers: int = 1) -> None:
        self.accepted = self.received = 0
        self._answers = answers
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            for _ in range(self._answers):
                if connection.recv(65536):
                    self.received += 1
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            if connection.recv(65536):
                self.received += 1


def test_a_request_on_an_idle_connection_that_is_just_being_closed_is_sent_once_more() -> None:
    engine = OneAnswerEach()
    app = make_app({"a": f"http://127.0.0.1:{engine.socket.getsockname()[1]}"}, socket=None, children=list)
    with running(app) as base, httpx.Client(base_url=base, timeout=60, trust_env=False) as client:
        for _ in range(4):
            assert client.post("/v1/completions", json={"model": "a"}).text == "ok"
    engine.socket.close()
    assert engine.received > engine.accepted, "some came on an idle connection"


def test_a_request_on_a_new_connection_is_sent_once() -> None:
    engine = OneAnswerEach(answers=0)
    app = make_app({"a": f"http://127.0.0.1:{engine.socket.getsockname()[1]}"}, socket=None, children=list)
    with running(app) as base, httpx.Client(base_url=base, timeout=60, trust_env=False) as client:
        got = client.post("/v1/completions", json={"model": "a"})
    engine.socket.close()
    assert (got.status_code, engine.received) == (503, 1)
    assert "went down while it worked" in got.json()["error"]["message"]


def test_a_model_that_is_known_to_be_down_is_not_asked() -> None:
    children = [ChildStatus(name="a", state="starting", pid=1, restarts=1, retry_in_s=0, last_exit="", ready_in_s=75)]
    app = make_app({"a": None}, socket=None, children=lambda: children)
    with running(app) as base, httpx.Client(base_url=base, timeout=60, trust_env=False) as client:
        got = client.post("/v1/completions", json={"model": "a"})
    assert (got.status_code, got.headers["retry-after"]) == (503, "75")
