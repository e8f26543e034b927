"""A dead child is reported and comes back, later each time; a stop leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from polder.errors import EnvironmentFault, UsageError
from polder.serve.child import Backoff, Child, Event
from polder.serve.process import PORT, ProcessSpec, free_port
from polder.serve.supervisor import Supervisor
from tests.serve.fakes import is_running, tree_argv, tree_pids, wait_for

QUICK = Backoff(first_s=0.1, most_s=0.4, healthy_s=60.0, attempts=3)


def child(code: str, name: str = "child", **options: object) -> ProcessSpec:
    return ProcessSpec(name=name, argv=(sys.executable, "-S", "-c", code), **options)  # type: ignore[arg-type]


def kinds(events: list[Event], name: str = "child") -> list[str]:
    return [event.kind for event in events if event.child == name]


def test_a_death_is_reported_and_answered_with_a_restart() -> None:
    events: list[Event] = []
    supervisor = Supervisor([child("import time; time.sleep(100)")], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: supervisor.status()[0].state == "ready", "the child")
    first = supervisor.status()[0].pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: supervisor.status()[0].restarts == 1 and supervisor.status()[0].state == "ready", "the restart")
    status = supervisor.status()[0]
    assert status.pid not in (None, first)
    assert status.last_exit == "ended with code 137"
    supervisor.stop()
    assert kinds(events) == ["started", "ready", "ended", "started", "ready", "stopped"]
    assert supervisor.status()[0].pid is None


def test_a_child_is_back_after_its_back_off_and_the_time_of_its_last_start() -> None:
    """So says Retry-After."""
    events: list[Event] = []
    supervisor = Supervisor(
        [child("import time; time.sleep(100)")], events.append, backoff=Backoff(first_s=1000.0, most_s=1000.0)
    )
    supervisor.start()
    wait_for(lambda: kinds(events)[-1:] == ["ready"], "the child")
    took_s = float(events[-1].detail.split()[2])
    pid = supervisor.status()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: supervisor.status()[0].state == "down", "its end")
    status = supervisor.status()[0]
    assert status.ready_in_s - status.retry_in_s == pytest.approx(took_s, abs=0.06)
    supervisor.stop()


def test_the_back_off_doubles_up_to_its_limit_and_is_forgotten_after_health() -> None:
    backoff = Backoff(first_s=1.0, most_s=30.0)
    waits = [0.0]
    for _ in range(7):
        waits.append(backoff.next(waits[-1]))
    assert waits[1:] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]

    events: list[tuple[float, Event]] = []
    forgetful = Backoff(first_s=0.05, most_s=10.0, healthy_s=0.1)
    supervisor = Supervisor(
        [child("import time; time.sleep(0.2)")], lambda e: events.append((time.monotonic(), e)), backoff=forgetful
    )
    supervisor.start()
    wait_for(lambda: len([e for _, e in events if e.kind == "ended"]) == 4, "four deaths")
    supervisor.stop()
    assert all("starting again in 0.05 s" in e.detail for _, e in events if e.kind == "ended")


def test_a_child_that_never_becomes_ready_is_given_up(tmp_path: Path) -> None:
    events: list[Event] = []
    spec = child(
        "print('no such model'); raise SystemExit(1)",
        log_path=tmp_path / "log",
        health_url=f"http://127.0.0.1:{free_port()}/health",
    )
    supervisor = Supervisor([spec], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: supervisor.status()[0].state == "failed", "the supervisor to give up")
    supervisor.stop()
    assert kinds(events) == ["started", "ended", "started", "failed"]
    assert "given up after 2 starts with the same end" in events[-1].detail
    assert "no such model" in events[-1].detail


def test_a_child_that_ends_otherwise_each_time_is_given_up_after_some_attempts() -> None:
    events: list[Event] = []
    url = f"http://127.0.0.1:{free_port()}/health"
    code = "import os; raise SystemExit(10 + os.getpid() % 100)"
    supervisor = Supervisor([child(code, health_url=url)], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: supervisor.status()[0].state == "failed", "the supervisor to give up")
    supervisor.stop()
    assert kinds(events).count("started") == 3
    assert "given up after 3 starts" in events[-1].detail


def test_a_wrong_command_line_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    events: list[Event] = []
    code = "import sys; print('vllm serve: error: unrecognized arguments: --enforce-eagr'); sys.exit(2)"
    url = f"http://127.0.0.1:{free_port()}/health"
    supervisor = Supervisor([child(code, log_path=tmp_path / "log", health_url=url)], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: supervisor.status()[0].state == "failed", "the supervisor to give up")
    supervisor.stop()
    assert kinds(events) == ["started", "failed"]
    assert "".join(event.detail for event in events).count("--enforce-eagr") == 1
    assert len(events[-1].detail.splitlines()) == 1


def test_each_start_has_a_port_of_its_own_and_only_a_ready_child_has_an_address(tmp_path: Path) -> None:
    """Another process may have taken the port while the child was down."""
    code = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
open(sys.argv[2], "a").write(sys.argv[1] + " ")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    argv = (sys.executable, "-S", "-c", code, PORT, str(tmp_path / "ports"))
    spec = ProcessSpec(name="a", argv=argv, health_url=f"http://127.0.0.1:{PORT}/health", log_path=tmp_path / "log")
    supervisor = Supervisor([spec], lambda _: None, backoff=QUICK)
    assert dict(supervisor) == {"a": None}
    supervisor.start()
    wait_for(lambda: supervisor["a"] is not None, "the child")
    first = supervisor["a"]
    assert first is not None
    pid = supervisor.status()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_for(lambda: supervisor["a"] is None, "its end")
        wait_for(lambda: not _listens(first), "the port to be free")
        taken.bind(("127.0.0.1", int(first.rpartition(":")[2])))
        taken.listen()
        wait_for(lambda: supervisor["a"] is not None, "the restart")
        assert supervisor["a"] != first
    supervisor.stop()
    assert len(set((tmp_path / "ports").read_text().split())) == 2


def _listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def test_a_child_that_loads_is_spoken_of_now_and_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("polder.serve.process.BEAT_S", 0.2)
    events: list[Event] = []
    code = "import time; print('Loading weights: 40 %', flush=True); time.sleep(100)"
    url = f"http://127.0.0.1:{free_port()}/health"
    supervisor = Supervisor([child(code, log_path=tmp_path / "log", health_url=url)], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: any("Loading weights: 40 %" in event.detail for event in events), "a sign of life")
    supervisor.stop()
    assert kinds(events)[:2] == ["started", "loading"]


def test_children_come_go_and_are_replaced_while_the_others_run() -> None:
    events: list[Event] = []
    sleeps = "import time; time.sleep(100)"
    supervisor = Supervisor([child(sleeps, "a")], events.append, backoff=QUICK)
    supervisor.start()
    supervisor.add(child(sleeps, "b"))
    with pytest.raises(UsageError, match="runs already"):
        supervisor.add(child(sleeps, "b"))
    wait_for(lambda: all(status.state == "ready" for status in supervisor.status()), "both")
    a, b = (status.pid for status in supervisor.status())
    supervisor.replace(child(sleeps, "b"))
    wait_for(lambda: supervisor.status()[1].state == "ready", "another b")
    assert supervisor.status()[0].pid == a
    assert supervisor.status()[1].pid != b
    supervisor.remove("b")
    assert list(supervisor) == ["a"]
    for order in (lambda: supervisor.remove("b"), lambda: supervisor.replace(child(sleeps, "b"))):
        with pytest.raises(UsageError, match="no model 'b'"):
            order()
    supervisor.stop()
    assert kinds(events, "a") == ["started", "ready", "stopped"]
    assert kinds(events, "b") == ["started", "ready", "stopped"] * 2
    with pytest.raises(UsageError, match="being ended"):
        supervisor.add(child(sleeps, "c"))


def test_orders_at_the_same_time_start_one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would serve nobody, and nobody would end it."""
    supervisor = Supervisor([child("import time; time.sleep(60)")], lambda event: None)
    supervisor.start()
    both = threading.Barrier(2)
    started: list[int] = []
    refused: list[int] = []
    stop = Child.stop

    def stop_together(self: Child, grace_s: float) -> None:
        stop(self, grace_s)
        both.wait(60)

    def order() -> None:
        try:
            supervisor.replace(child("import time; time.sleep(60)"))
            started.append(1)
        except UsageError:
            refused.append(1)

    with monkeypatch.context() as patched:
        patched.setattr(Child, "stop", stop_together)
        threads = [threading.Thread(target=order) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    supervisor.stop()
    assert (len(started), len(refused)) == (1, 1)


def test_a_child_in_which_polder_refuses_a_setting_is_given_up_at_once_with_its_words(tmp_path: Path) -> None:
    events: list[Event] = []
    words = "this model has no KV cache, so POLDER_TIERS does nothing for it: remove it"
    code = f"print('(EngineCore pid=7) polder.errors.ConfigError: {words}'); print('more', *range(9000)); raise SystemExit(1)"
    url = f"http://127.0.0.1:{free_port()}/health"
    (tmp_path / "log").write_text("polder.errors.ConfigError: of a former fleet\n")
    supervisor = Supervisor([child(code, log_path=tmp_path / "log", health_url=url)], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: supervisor.status()[0].state == "failed", "the supervisor to give up")
    supervisor.stop()
    assert kinds(events) == ["started", "failed"]
    assert events[-1].detail == words


def test_a_child_that_stops_answering_is_replaced(tmp_path: Path) -> None:
    """SIGSTOP, by which it does not end, nor hear SIGTERM."""
    events: list[Event] = []

    def answers() -> bool:
        try:
            stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "SR"

    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    supervisor = Supervisor([child(code, is_ready=answers, silent_s=4.0)], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: supervisor.status()[0].state == "ready", "the child")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
    (tmp_path / "pid").rename(tmp_path / "former")
    wait_for(lambda: supervisor.status()[0].restarts == 1 and supervisor.status()[0].state == "ready", "a new one")
    assert not is_running(int((tmp_path / "former").read_text()))
    supervisor.stop()
    assert kinds(events) == ["started", "ready", "silent", "ended", "started", "ready", "stopped"]


def test_a_child_that_nobody_can_reach_any_more_is_replaced_at_once() -> None:
    """As a broker whose socket was removed. It would answer to nobody for as long as one that hangs may."""
    events: list[Event] = []
    reachable = iter([True, EnvironmentFault("its socket was removed")])

    def answers() -> bool:
        found = next(reachable, True)
        if isinstance(found, EnvironmentFault):
            raise found
        return found

    code = "import time; time.sleep(1000)"
    supervisor = Supervisor([child(code, is_ready=answers, silent_s=10.0)], events.append, backoff=QUICK)
    supervisor.start()
    wait_for(lambda: supervisor.status()[0].restarts == 1 and supervisor.status()[0].state == "ready", "a new one")
    supervisor.stop()
    assert kinds(events) == ["started", "ready", "silent", "ended", "started", "ready", "stopped"]
    assert events[2].detail == "its socket was removed: ending it"


def test_a_stop_leaves_no_process_of_any_tree(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    supervisor = Supervisor(
        [ProcessSpec(name=f.name, argv=tree_argv(f)) for f in folders], lambda _: None, backoff=QUICK
    )
    supervisor.start()
    pids = [pid for folder in folders for pid in tree_pids(folder)]
    before = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - before < 5, "side by side"
    assert not [pid for pid in pids if is_running(pid)]
    assert not [t for t in threading.enumerate() if t.name in ("polder-a", "polder-b")]


def test_a_stop_during_start_and_back_off_ends_at_once() -> None:
    never_ready = child("import time; time.sleep(100)", "slow", health_url=f"http://127.0.0.1:{free_port()}/health")
    dying = child("raise SystemExit(1)", "dying")
    slow = Backoff(first_s=60.0, most_s=60.0)
    supervisor = Supervisor([never_ready, dying], lambda _: None, backoff=slow)
    supervisor.start()
    wait_for(lambda: supervisor.status()[1].state == "down" and supervisor.status()[0].pid is not None, "both")
    assert 50 < supervisor.status()[1].retry_in_s <= 60
    before = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - before < 30


def test_one_start_at_a_time_when_asked() -> None:
    events: list[Event] = []
    url = f"http://127.0.0.1:{free_port()}/health"
    specs = [child("import time; time.sleep(100)", name, health_url=url) for name in ("first", "second")]
    supervisor = Supervisor(specs, events.append, backoff=QUICK, starts_at_once=1)
    supervisor.start()
    wait_for(lambda: bool(events), "the first start")
    time.sleep(0.3)
    assert [event.kind for event in events] == ["started"]
    supervisor.stop()
    assert len([event for event in events if event.kind == "started"]) == 1


def test_a_supervisor_that_never_started_stops() -> None:
    Supervisor([child("pass")], lambda _: None).stop()
