"""Stand-ins: a broker that answers with a canned status, an upstream that is a real HTTP server, a small process tree."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from polder.broker.transport import encode, to_broker
from polder.broker.wire import DeviceStatus, Done, EngineStatus, FromBroker, Refused, Resize, Status, StatusRequest

MIB = 1 << 20


def engine_status(name: str, **changes: Any) -> EngineStatus:
    values: dict[str, Any] = {
        "engine": name,
        "model": f"models/{name}",
        "pid": 4242,
        "devices": ["cpu:0"],
        "state": "serving",
        "pages_per_unit": 8,
        "unit_tokens": 256,
        "held_units": 12,
        "floor_units": 2,
        "share_units": 10,
        "ceiling_units": 18,
        "target_units": 12,
        "pinned_units": 0,
        "busy_units": 7,
        "waiting_units": 1,
        "cached_units": 9,
        "borrowed_units": 2,
        "lent_units": 0,
        "recalled_units": 3,
        "reason": "requests, beyond its share",
        "curve": [0.0, 0.5, 0.75],
        "giveback_ms": [],
        "stats": {
            "prefix_queries_tokens_total": 1000.0,
            "prefix_hits_tokens_total": 640.0,
            "preemptions_total": 1.0,
            "running_requests": 3.0,
            "waiting_requests": 2.0,
            "kv_used_ratio": 0.58,
        },
    }
    return EngineStatus(**values | changes)


def canned_status() -> Status:
    lender = engine_status(
        "b",
        held_units=6,
        busy_units=1,
        waiting_units=0,
        cached_units=4,
        borrowed_units=0,
        lent_units=4,
        reason="floor",
        stats={},
        giveback_ms=[4.0, 30.0, 150.0],
    )
    device = DeviceStatus(
        device="cpu:0", page_bytes=2 * MIB, total_pages=160, free_pages=16, pages_by_owner={"a/kv": 96, "b/kv": 48}
    )
    return Status(
        generation=7,
        uptime_s=61.5,
        devices=[device],
        engines=[engine_status("a"), lender],
        grants=5,
        recalls=3,
        overdue=1,
        refused_messages=2,
        reclaimed_pages=8,
        giveback_ms=[4.0, 30.0, 150.0],
    )


@contextlib.contextmanager
def fake_broker(path: Path, status: Status) -> Iterator[list[Resize]]:
    """Answers StatusRequest and Resize; yields the resizes it got. It knows the engines of `status` only."""
    resizes: list[Resize] = []

    def answer_to(message: object) -> FromBroker:
        if isinstance(message, StatusRequest):
            return status
        assert isinstance(message, Resize)
        if message.engine not in {engine.engine for engine in status.engines}:
            return Refused(reason=f"no engine {message.engine!r} here")
        resizes.append(message)
        return Done()

    def serve(connection: socket.socket) -> None:
        with connection:
            deframer = to_broker()
            while data := connection.recv(65536):
                for message in deframer.feed(data):
                    connection.sendall(encode(answer_to(message)))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield resizes
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        thread.join(60)
    path.unlink(missing_ok=True)


@dataclass
class FakeEngine:
    """An ASGI app in place of a `vllm serve`: records requests, answers what the test puts in."""

    name: str
    app: Callable[..., Any] | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)
    adapters: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.requests.append(
            {"path": scope["path"], "query": scope["query_string"], "body": body, "headers": dict(scope["headers"])}
        )
        assert self.app is not None
        await self.app(self, scope, receive, send)


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """A real server in a thread; yields its base URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # who connects before the server runs waits, and is not refused
    lifespan: Any = "on" if hasattr(app, "router") else "off"
    config = uvicorn.Config(app, log_level="critical", lifespan=lifespan, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline, f"waited 120 s for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


TREE = """
import subprocess, sys, time
child = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(100)
'''
for i in range(2):
    subprocess.Popen([sys.executable, "-S", "-c", child, f"{sys.argv[1]}/{i}"], start_new_session=bool(i))
time.sleep(100)
"""
"""Starts two grandchildren that ignore SIGTERM, the second in a session of its own; they write their ids into argv[1]."""


def tree_argv(folder: Path) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", TREE, str(folder))


def tree_pids(folder: Path) -> list[int]:
    """Waits for both grandchildren."""
    files = [folder / "0", folder / "1"]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files), "the tree to stand")
    return [int(f.read_text()) for f in files]
