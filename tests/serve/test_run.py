"""`polder serve` as users run it, with small HTTP servers in place of vLLM: up, a death, a stop, nothing left."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from polder.broker import client
from polder.serve.control import children_of
from polder.serve.machine import host_memory
from polder.serve.process import free_port
from tests.serve.fakes import canned_status, fake_broker, is_running, wait_for

ENGINE = """
import http.server, os, sys, time
name, port = sys.argv[1], int(sys.argv[2])
if "polder" in os.environ["VLLM_PLUGINS"]:
    from pathlib import Path
    from polder.broker.client import request
    from polder.broker.wire import Stock
    request(Path(os.environ["POLDER_BROKER"]), Stock(engine=name, reason="a test"))
with open(f"{os.environ['VLLM_RPC_BASE_PATH']}/of-an-engine-{os.getpid()}", "w"):
    pass  # a socket that nobody removes
if os.fork() == 0:  # an engine core, as vLLM has one
    time.sleep(100)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b'{"data": [{"id": "%s"}]}' % name.encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        key = os.environ["VLLM_API_KEY"] == self.headers["authorization"].partition(" ")[2]
        self.answer(f"{name} {os.getpid()} {os.environ['POLDER_BROKER']} {key}".encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
SERVE = """
import functools
import os
import sys
import polder.serve.specs as specs
from polder.cli.main import main
from polder.serve.process import PORT, ProcessSpec

script = sys.argv[1]

def engine(path, *, name, args, env, cpus, log_path):
    env = env | ({"VLLM_PLUGINS": "other"} if os.environ.get("TEST_WITHOUT_POLDER") else {})
    argv = (sys.executable, script, name, PORT)
    return ProcessSpec(name=name, argv=argv, env=env, log_path=log_path, health_url=f"http://127.0.0.1:{PORT}/health")

specs.vllm_serve = engine
specs.Presence = functools.partial(specs.Presence, patience_s=0.2)
sys.argv = ["polder", "serve", *sys.argv[2:]]
main()
"""


KEY = {"Authorization": "Bearer fleet's"}


class Serve:
    """One `polder serve --json` in a process of its own."""

    def __init__(self, tmp_path: Path, short_dir: Path, engine: str = ENGINE) -> None:
        self.port = free_port()
        self.runtime = short_dir
        self.state = tmp_path / "state"
        (tmp_path / "engine.py").write_text(engine)
        (tmp_path / "fleet.toml").write_text(
            f'[server]\nport = {self.port}\n[memory]\ndevice = "cpu:0"\nkv_budget = "16MiB"\n'
            '[[model]]\nname = "a"\npath = "some/model"\n[[model]]\nname = "b"\npath = "some/model"\n'
        )
        self._argv = [sys.executable, "-c", SERVE, str(tmp_path / "engine.py"), str(tmp_path / "fleet.toml"), "--json"]
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str, shell: str = 'exec "$@"') -> Serve:
        self.process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *self._argv, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "XDG_RUNTIME_DIR": str(self.runtime),
                "XDG_STATE_HOME": str(self.state),
                "VLLM_PLUGINS": "some_other",
                "VLLM_API_KEY": "fleet's",
            },
        )
        return self

    def get(self, path: str, headers: dict[str, str] = KEY) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, trust_env=False, timeout=60)

    def ready(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, model: str) -> httpx.Response:
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        return httpx.post(url, json={"model": model}, headers=KEY, trust_env=False, timeout=60)

    def children(self) -> dict[str, dict[str, Any]]:
        return {child["name"]: child for child in self.get("/health").json()["children"]}

    def tree(self) -> list[int]:
        """All processes under it."""
        assert self.process is not None
        found, todo = [], [self.process.pid]
        while todo:
            below = subprocess.run(["pgrep", "-P", str(todo.pop())], capture_output=True, text=True).stdout.split()
            todo += [int(pid) for pid in below]
            found += [int(pid) for pid in below]
        return found

    def end(self, number: signal.Signals) -> tuple[list[dict[str, Any]], str]:
        """Its events and what it wrote to stderr."""
        assert self.process is not None
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def serve(tmp_path: Path, short_dir: Path) -> Iterator[Serve]:
    serve = Serve(tmp_path, short_dir)
    yield serve
    if serve.process is not None and serve.process.returncode is None:
        serve.process.kill()
        print(*serve.process.communicate())  # shown when the test fails


def test_up_killed_restarted_and_gone_without_a_trace(serve: Serve) -> None:
    serve.start()
    wait_for(serve.ready, "the fleet")
    assert serve.ask("a").text.startswith("a ")
    name, pid, broker, keyed = serve.ask("b").text.split()
    assert (name, keyed) == ("b", "True"), "with a key of its own"
    assert serve.get("/v1/models", {}).status_code == 401
    assert client.status(Path(broker)).devices[0].total_pages == 8
    assert [m["id"] for m in serve.get("/v1/models").json()["data"]] == ["a", "b"]

    os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: serve.children()["b"]["restarts"] == 1, "the restart")
    assert serve.ask("a").status_code == 200, "the other serves on"
    wait_for(serve.ready, "b to be back")
    assert serve.ask("b").text.split()[1] != pid

    tree = serve.tree()
    assert len(tree) >= 3 * 2 + 2, "guards, broker, engines, cores"
    events, errors = serve.end(signal.SIGTERM)
    assert serve.process is not None
    assert serve.process.returncode == 0, errors
    assert not [pid for pid in tree if is_running(pid)]
    assert list(serve.runtime.iterdir()) == []
    kinds = [(event["child"], event["event"]) for event in events if event["child"] == "b"]
    assert kinds == [("b", kind) for kind in ("started", "ready", "ended", "started", "ready", "stopped")]
    assert errors == ""


def test_a_connection_on_which_nothing_is_asked_for_longer_than_clients_keep_theirs_stays_open(serve: Serve) -> None:
    """Clients keep connections for 5 s and more: closed then, a request could meet a connection that is just being closed."""
    serve.start()
    wait_for(serve.ready, "the fleet")
    connection = http.client.HTTPConnection("127.0.0.1", serve.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models", headers=KEY)
        assert connection.getresponse().read()
        assert connection.sock is not None
        assert not select.select([connection.sock], [], [], 6.5)[0], "closed"


def test_who_reads_the_events_may_go_away(serve: Serve) -> None:
    """`polder serve ... | head -1`, or a terminal that is lost."""
    serve.start()
    assert serve.process is not None
    assert serve.process.stdout is not None
    assert serve.process.stderr is not None
    serve.process.stdout.readline()
    serve.process.stdout.close()
    serve.process.stderr.close()
    wait_for(serve.ready, "the fleet")
    os.kill(int(serve.ask("b").text.split()[1]), signal.SIGKILL)
    wait_for(lambda: serve.children()["b"]["restarts"] == 1 and serve.ready(), "the restart")
    serve.process.terminate()
    assert serve.process.wait(120) == 0
    assert list(serve.runtime.iterdir()) == []


def test_closed_standard_streams_are_no_fault(serve: Serve) -> None:
    """As under cron, or a service manager. What is opened first must not be taken for standard output."""
    serve.start(shell='exec "$@" <&- >&- 2>&-')
    wait_for(serve.ready, "the fleet")
    assert serve.ask("a").text.startswith("a ")
    assert serve.end(signal.SIGTERM) == ([], "")
    assert serve.process is not None
    assert serve.process.returncode == 0


def test_the_command_that_is_shown_works_as_printed_and_the_end_of_the_terminal_ends_the_fleet(serve: Serve) -> None:
    here = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # children inherit that it is ignored, as under nohup
    serve.start()
    signal.signal(signal.SIGHUP, here)
    wait_for(serve.ready, "the fleet")
    command = (
        f'curl http://127.0.0.1:{serve.port}/v1/completions -H "Authorization: Bearer $VLLM_API_KEY" '
        """-H 'Content-Type: application/json' -d '{"model": "a", "prompt": "Hello", "max_tokens": 16}'"""
    )
    if shutil.which("curl") is not None:
        variables = {**os.environ, "VLLM_API_KEY": "fleet's", "no_proxy": "*"}
        assert subprocess.run(command, shell=True, env=variables, capture_output=True, text=True).stdout.startswith(
            "a "
        )
    events, _ = serve.end(signal.SIGHUP)
    (shown,) = (event["detail"] for event in events if (event["child"], event["event"]) == ("gateway", "ready"))
    assert shown.splitlines()[1:] == [command]
    assert serve.process is not None
    assert serve.process.returncode == 0
    assert list(serve.runtime.iterdir()) == []


def test_a_directory_that_a_cleaner_has_removed_is_made_again(serve: Serve) -> None:
    """Before a broker that hangs would be replaced, and with the socket that takes orders."""
    serve.start()
    wait_for(serve.ready, "the fleet")
    _, pid, socket_path, _ = serve.ask("a").text.split()
    shutil.rmtree(Path(socket_path).parent)
    wait_for(lambda: serve.get("/health").json()["status"] == "degraded", "it to be noticed")
    assert serve.ask("a").text.split()[1] == pid, "the models serve on"
    os.kill(int(serve.ask("b").text.split()[1]), signal.SIGKILL)
    wait_for(lambda: serve.get("/health").json()["status"] == "ok", "a broker that can be reached")
    assert client.status(Path(socket_path)).devices[0].total_pages == 8
    wait_for(serve.ready, "b to be back")
    wait_for(Path(f"{socket_path}.ctl").exists, "a socket for orders")
    command = [sys.executable, "-m", "polder.cli.main", "ctl", "remove", "b"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(serve.runtime)}
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "b: removed\n")
    events, _ = serve.end(signal.SIGTERM)
    said = [event["detail"] for event in events if event["event"] == "silent"]
    assert said == [f"{socket_path} was removed, so nobody can reach it: ending it"]
    assert list(serve.runtime.iterdir()) == []


def test_top_shows_the_models_that_still_load(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text("import time; time.sleep(600)")
    here = serve.runtime / "here"
    serve.start("--socket", str(here))
    wait_for(
        lambda: {child.name for child in children_of(here) if child.state == "starting"} == {"a", "b"}, "the models"
    )
    command = [sys.executable, "-m", "polder.cli.main", "top", "--once", "--socket", str(here)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert [line for line in text.splitlines() if "starting" in line] == ["a is starting", "b is starting"]
    serve.end(signal.SIGTERM)
    assert children_of(here) == []


def test_a_model_comes_goes_and_starts_anew_while_the_other_serves(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    serve.start("--socket", str(serve.runtime / "here"))
    wait_for(serve.ready, "the fleet")
    pid = serve.ask("a").text.split()[1]

    def ctl(verb: str, model: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "polder.cli.main", "ctl", verb, model, "--socket", str(serve.runtime / "here")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, words = ctl("add", "c")
    assert (code, "add a [[model]] with this name" in words) == (2, True)
    path.write_text(path.read_text() + '[[model]]\nname = "c"\npath = "some/model"\n')
    assert ctl("add", "c") == (0, "c: ready\n")
    assert serve.ask("c").text.startswith("c ")
    code, words = ctl("add", "c")
    assert (code, "c runs already" in words) == (2, True)

    former = serve.ask("b").text.split()[1]
    assert ctl("restart", "b") == (0, "b: ready\n")
    assert serve.ask("b").text.split()[1] != former
    assert ctl("remove", "b") == (0, "b: removed\n")
    assert serve.ask("b").status_code == 404
    assert [entry["id"] for entry in serve.get("/v1/models").json()["data"]] == ["a", "c"]

    text = path.read_text()
    path.write_text(text.replace("16MiB", "32MiB"))
    assert "needs a restart of the fleet" in ctl("add", "b")[1]
    path.write_text(text)
    (tmp_path / "engine.py").write_text("import sys; print('vllm serve: error: no such flag'); sys.exit(2)")
    code, words = ctl("add", "b")
    assert (code, "no such flag" in words) == (3, True)
    assert serve.ready(), "what cannot be added harms nobody"
    assert serve.ask("a").text.split()[1] == pid
    mode = (serve.runtime / "here.ctl").stat().st_mode
    assert mode & 0o777 == 0o600
    serve.end(signal.SIGTERM)
    assert list(serve.runtime.iterdir()) == []
    assert "no `polder serve` takes orders" in ctl("remove", "a")[1]


def test_a_model_is_checked_before_it_is_added_or_started_again(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    serve.start("--socket", str(serve.runtime / "here"))
    wait_for(serve.ready, "the fleet")
    pid = serve.ask("b").text.split()[1]
    (tmp_path / "small").mkdir()
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64}
    config = sizes | {"max_position_embeddings": 512, "torch_dtype": "float32", "vocab_size": 100}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    model = 'path = "small"\nmax_model_len = 1024'
    text = path.read_text()
    path.write_text(text.replace('path = "some/model"', model) + f'[[model]]\nname = "c"\n{model}\n')
    for verb, name in (("restart", "b"), ("add", "c")):
        command = [sys.executable, "-m", "polder.cli.main", "ctl", verb, name, "--socket", str(serve.runtime / "here")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, "more than the model's own 512" in done.stderr) == (2, True), done.stderr
    assert serve.ask("b").text.split()[1] == pid, "it serves on as it was"
    assert serve.ask("c").status_code == 404
    serve.end(signal.SIGTERM)


def test_too_little_memory_by_an_estimate_is_no_refusal_for_who_says_so(serve: Serve, tmp_path: Path) -> None:
    path, total = tmp_path / "fleet.toml", host_memory().total_bytes
    text = path.read_text()
    path.write_text(text.replace("16MiB", f"{(total >> 20) - 64}MiB"))
    code, words = refusal(serve)
    assert (code, "--memory-check warn starts it all the same" in words) == (2, True)
    serve.start("--memory-check", "warn")
    wait_for(serve.ready, "the fleet")
    _, errors = serve.end(signal.SIGTERM)
    assert "lower memory.kv_budget" in errors
    path.write_text(text.replace("16MiB", f"{2 * total >> 20}MiB"))
    code, words = refusal(serve, "--memory-check", "warn")
    assert (code, "warn starts it" in words) == (2, False), "there is no such memory"


def test_directories_on_disks_are_made_before_anything_starts(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    path = tmp_path / "fleet.toml"
    text = path.read_text().replace("[[model]]", f'host = "8MiB"\ndisks = ["{tmp_path}/nvme:64MiB"]\n[[model]]', 1)
    path.write_text(text.replace('name = "b"', 'name = "b/8"\ntiers = ["host", "disk"]'))
    serve.start()
    wait_for(serve.ready, "the fleet")
    assert [made.name for made in (tmp_path / "nvme").iterdir()] == ["b%2F8"]
    serve.end(signal.SIGTERM)
    assert (tmp_path / "nvme" / "b%2F8").is_dir(), "what is on disk stays"


def test_a_killed_serve_takes_everything_along(serve: Serve) -> None:
    serve.start()
    wait_for(serve.ready, "the fleet")
    tree = serve.tree()
    assert serve.process is not None
    serve.process.kill()
    serve.process.communicate()
    wait_for(lambda: not [pid for pid in tree if is_running(pid)], "the tree to end")


def test_a_killed_broker_comes_back_on_its_socket(serve: Serve) -> None:
    serve.start("--socket", str(serve.runtime / "here"))
    wait_for(serve.ready, "the fleet")
    wait_for(lambda: serve.get("/health").json()["status"] == "ok", "the broker")
    before = client.status(serve.runtime / "here").generation
    guard = serve.children()["broker"]["pid"]
    os.kill(int(subprocess.check_output(["pgrep", "-P", str(guard)])), signal.SIGKILL)
    states = set()

    def is_back() -> bool:
        answer = serve.get("/health")
        states.add((answer.status_code, answer.json()["status"]))
        return bool(serve.children()["broker"]["restarts"] == 1 and answer.json()["status"] == "ok")

    wait_for(is_back, "the broker")
    assert states == {(200, "degraded"), (200, "ok")}, "the models serve all the time"
    assert client.status(serve.runtime / "here").generation != before
    serve.end(signal.SIGINT)
    assert serve.process is not None
    assert serve.process.returncode == 0
    assert list(serve.runtime.iterdir()) == []


def test_an_engine_that_cannot_start_ends_the_fleet_with_its_words(tmp_path: Path, short_dir: Path) -> None:
    serve = Serve(tmp_path, short_dir, "raise SystemExit('unknown option --frobnicate')").start(
        "--log-dir", str(tmp_path / "logs")
    )
    assert serve.process is not None
    out, errors = serve.process.communicate(timeout=120)
    assert serve.process.returncode == 3
    events = [json.loads(line) for line in out.splitlines()]
    failed = next(event for event in events if event["event"] == "failed")
    assert "given up after 2 starts" in failed["detail"]
    assert "unknown option --frobnicate" in failed["detail"]
    assert f"did not start; logs in {tmp_path / 'logs'}" in errors
    assert len(errors.splitlines()) == 1
    assert "--frobnicate" in (tmp_path / "logs" / "a.log").read_text()
    assert list(short_dir.iterdir()) == []


def test_the_logs_of_a_start_that_is_broken_off_are_kept(tmp_path: Path, short_dir: Path) -> None:
    serve = Serve(tmp_path, short_dir, "import time; print('the reason', flush=True); time.sleep(100)").start()
    logs = short_dir / "polder"
    wait_for(lambda: any("the reason" in path.read_text() for path in logs.glob("*/a*.log")), "its words")
    events, _ = serve.end(signal.SIGINT)
    assert serve.process is not None
    assert serve.process.returncode == 0
    assert events[-1]["detail"].startswith("stopped; not ready yet: a, b: logs in ")
    kept = list((serve.state / "polder").glob("logs-*/a*.log"))
    assert [path.read_text() for path in kept] == ["the reason\n"]


def test_an_engine_that_the_broker_does_not_hear_of_is_never_ready(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have memory of its own beside the budget, and a fleet that calls itself ready would hide it."""
    monkeypatch.setenv("TEST_WITHOUT_POLDER", "1")
    serve.start()
    assert serve.process is not None
    out, errors = serve.process.communicate(timeout=180)
    assert serve.process.returncode == 3
    assert "the broker does not know it: it serves without Polder" in out
    assert [line for line in map(json.loads, out.splitlines()) if line["event"] == "ready"][1:] == [], "only the broker"
    kept = Path(errors.strip().rpartition("logs in ")[2])
    assert {path.name for path in kept.iterdir()} == {"a.log", "b.log", "broker.log"}


# ---------------------------------------------------------------- refused before anything is started


def refusal(serve: Serve, *arguments: str) -> tuple[int, str]:
    serve.start(*arguments)
    assert serve.process is not None
    out, errors = serve.process.communicate(timeout=120)
    assert out == "", "something was started"
    assert errors.startswith("polder: ")
    assert len(errors.splitlines()) == 1
    return serve.process.returncode, errors


def test_a_port_in_use(serve: Serve) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", serve.port))
        taken.listen()
        code, words = refusal(serve)
    assert code == 3
    assert f"cannot listen on 127.0.0.1:{serve.port}: Address already in use" in words


def test_a_socket_path_too_long(serve: Serve, short_dir: Path) -> None:
    assert refusal(serve, "--socket", str(short_dir / ("x" * 100)))[0] == 2
    serve.runtime = short_dir / ("y" * 100)
    code, words = refusal(serve)
    assert code == 2
    assert "the limit is 107" in words


def test_a_broker_on_the_socket(serve: Serve, short_dir: Path) -> None:
    with fake_broker(short_dir / "s", canned_status()):
        code, words = refusal(serve, "--socket", str(short_dir / "s"))
    assert code == 3
    assert "a broker already listens on" in words


def test_a_socket_where_none_can_be(serve: Serve, short_dir: Path) -> None:
    (short_dir / "file").touch()
    assert "is no socket" in refusal(serve, "--socket", str(short_dir / "file"))[1]
    assert "no directory" in refusal(serve, "--socket", str(short_dir / "none" / "s"))[1]
