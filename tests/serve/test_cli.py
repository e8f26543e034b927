"""The command line is public: verbs, flags, output and exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import typer
from msgspec.structs import replace
from rich.console import Console

from polder.broker.wire import Decision, Resize
from polder.cli import doctor
from polder.cli.main import app, main
from polder.cli.view import render, watch
from polder.errors import EnvironmentFault
from polder.serve.child import ChildStatus
from polder.serve.supervisor import FleetStatus
from tests.serve.fakes import canned_status, engine_status, fake_broker
from tests.serve.test_fleet import GOOD, model, write

__all__ = ["model"]

SURFACE = {
    "serve": {"fleet", "--check", "--memory-check", "--socket", "--log-dir", "--json"},
    "broker": {"--socket", "--device", "--page", "--reserve-low", "--reserve-high", "--hold", "--deadline"},
    "init": {"models", "--out", "--device", "--port"},
    "top": {"--socket", "--url", "--once", "--json", "--interval"},
    "ctl status": {"--socket", "--json"},
    "ctl resize": {"engine", "size", "--socket", "--json"},
    "ctl add": {"model", "--socket", "--json"},
    "ctl remove": {"model", "--socket", "--json"},
    "ctl restart": {"model", "--socket", "--json"},
    "ctl explain": {"--socket", "--json"},
    "ctl sleep": {"engine", "--socket", "--json"},
    "ctl wake": {"engine", "--socket", "--json"},
    "ctl stream": {"engine", "layers", "--socket", "--json"},
    "plan": {
        *("models", "--device", "--host", "--neighbours", "--link", "--context", "--window", "--chunk", "--tbt-goal"),
        *("--tensor-parallel-size", "--json", "--html"),
    },
    "sim cache": {"--trace", "--policy", "--json"},
    "doctor": {"--json"},
    "fsck": {"directory", "--repair", "--json"},
    "version": {"--json"},
}


def surface() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def walk(command: object, path: str) -> None:
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}".strip())
        if not hasattr(command, "commands"):
            found[path] = {p.opts[0] for p in command.params}  # type: ignore[attr-defined]

    walk(typer.main.get_command(app), "")
    return found


def test_verbs_and_flags_are_those_that_were_published() -> None:
    assert {verb: flags for verb, flags in surface().items() if not verb.startswith("bench")} == SURFACE


def polder(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As the shell would run it, but in this process: a new one takes a second."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["polder", *arguments]),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def test_it_runs_as_a_module_and_maps_errors_to_exit_codes(short_dir: Path) -> None:
    command = [sys.executable, "-m", "polder.cli.main", "top", "--once", "--socket", str(short_dir / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.startswith("polder: no broker answers")


def test_the_help_of_serve_shows_a_whole_fleet_file() -> None:
    text = polder("serve", "--help").stdout
    assert "[memory]\n" in text
    assert "[[model]]" in text


# ---------------------------------------------------------------- serve, broker


def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = polder("serve", str(tmp_path / "none.toml"))
    assert done.returncode == 2
    assert done.stderr.startswith("polder: cannot read")
    assert len(done.stderr.splitlines()) == 1


def test_check_starts_nothing_and_ends_with_2_unless_all_needs_are_met(tmp_path: Path, model: Path) -> None:
    path = str(write(tmp_path, GOOD.format(model=model).replace('args = ["--block-size", "32"]', "")))
    done = polder("serve", path, "--check", "--json")
    found = json.loads(done.stdout)
    assert found["least_bytes"] == {"a": 48 << 20}
    assert (done.returncode, found["enough"]) == (2, False), "the model has no weights"
    text = polder("serve", path, "--check").stdout
    assert "ok  KV memory of a: 48 MiB at least" in text
    assert "unknown  a: weights" in text
    assert text.splitlines()[-1].startswith("not enough, or not known to be: ")


def test_a_second_broker_on_a_socket_is_refused(short_dir: Path) -> None:
    with fake_broker(short_dir / "s", canned_status()):
        done = polder("broker", "--socket", str(short_dir / "s"), "--device", "cpu:0=4MiB")
    assert done.returncode == 3
    assert "already listens" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--device", "cpu:0", "write NAME=SIZE"),
        ("--device", "cpu:0=90TiB", "90 TiB of host memory, and there are "),
        ("--device", "cpu:0=much", "cannot read 'much'"),
        ("--device", "gpu=1GiB", "device 'gpu': write cpu:0"),
        ("--socket", "/tmp/" + "x" * 110, "the limit is 107"),
        ("--hold", "soon", "--hold: cannot read 'soon'"),
    ],
)
def test_a_bad_broker_option_is_refused(short_dir: Path, option: str, value: str, words: str) -> None:
    options = {"--socket": str(short_dir / "b"), "--device": "cpu:0=4MiB"} | {option: value}
    done = polder("broker", *(word for pair in options.items() for word in pair))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


# ---------------------------------------------------------------- top, ctl


def test_top_once_json_is_the_whole_status(short_dir: Path) -> None:
    with fake_broker(short_dir / "s", canned_status()):
        by_option = polder("top", "--once", "--json", "--socket", str(short_dir / "s")).stdout
        by_environment = polder("top", "--once", "--json", POLDER_BROKER=str(short_dir / "s")).stdout
        by_ctl = polder("ctl", "status", "--json", "--socket", str(short_dir / "s")).stdout
    golden = {"broker": {"t": "status", **msgspec.to_builtins(canned_status())}, "children": []}
    assert json.loads(by_option) == json.loads(by_environment) == json.loads(by_ctl) == golden
    assert list(golden["broker"]["engines"][0]) == [
        *("engine", "model", "pid", "devices", "state", "pages_per_unit", "unit_tokens", "held_units", "floor_units"),
        *("share_units", "ceiling_units", "target_units", "pinned_units", "busy_units", "waiting_units"),
        *("cached_units", "borrowed_units", "lent_units", "recalled_units", "reason", "curve", "giveback_ms", "stats"),
        *("layers", "layer_pages", "segments", "asleep", "weights_reason"),
    ]


def test_top_finds_the_fleet_that_runs(short_dir: Path) -> None:
    folder = short_dir / "polder" / "fabc"
    folder.mkdir(parents=True)
    with fake_broker(folder / "broker.sock", canned_status()):
        done = polder("top", "--once", POLDER_BROKER="", XDG_RUNTIME_DIR=str(short_dir))
    assert done.returncode == 0
    assert "cpu:0  320 MiB" in done.stdout
    none = polder("top", "--once", POLDER_BROKER="", XDG_RUNTIME_DIR=str(short_dir / "none"))
    assert none.returncode == 3
    assert "start `polder serve`, or name a broker with --socket" in none.stderr


def test_no_broker_is_exit_code_3(short_dir: Path) -> None:
    for arguments in (("top", "--once"), ("ctl", "explain")):
        done = polder(*arguments, "--socket", str(short_dir / "none"))
        assert done.returncode == 3
        assert "no broker answers" in done.stderr
    assert polder("top", "--once", "--url", "http://127.0.0.1:9").returncode == 3


def shown(snapshot: FleetStatus, before: FleetStatus | None = None, width: int = 160) -> str:
    with open("/dev/null", "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(render(snapshot, before, width=width))
    return console.export_text()


def test_top_shows_who_holds_what_and_why() -> None:
    down = ChildStatus(name="b", state="down", pid=None, restarts=4, retry_in_s=2.0, last_exit="ended with code 137")
    text = shown(FleetStatus(broker=canned_status(), children=[down]))
    lines = text.splitlines()
    assert lines[0].count("█") == 54
    assert lines[0].count("░") == 6, "the bar has its length"
    assert "a/kv 192 MiB  b/kv 96 MiB  free 32 MiB" in text
    memory = next(line for line in lines if line.startswith("a ")).replace("\u00a0", "").split()
    sizes = ("192MiB", "32MiB", "160MiB", "288MiB", "112MiB", "16MiB", "144MiB", "32MiB", "0B", "192MiB")
    assert memory == ["a", "serving", *sizes]
    assert "recalled" not in text.partition("grants")[0], "a total since the start is no size of now"
    requests = [line for line in lines if line.startswith("a ")][1].split(maxsplit=6)
    assert [word.strip() for word in requests] == ["a", "3", "2", "58%", "64%", "0.016", "requests, beyond its share"]
    assert "5 grants   3 recalls   1 overdue   give-back p50 30 ms, p99 150 ms (last 3)" in text
    assert "b is down, restarts 4 ended with code 137" in text


def test_top_shows_weights_and_what_was_decided_last() -> None:
    stats = {"weights_loaded_bytes_total": 0.0, "weights_stall_seconds_total": 0.0}
    weights = {"layers": 12, "layer_pages": 6, "weights_reason": "a request came", "stats": stats}
    awake, asleep = engine_status("a", segments=9, **weights), engine_status("b", asleep=True, **weights)
    decision = Decision(uptime_s=51.5, engine="a", action="take", segments=3, reason="it can stream these")
    status = replace(canned_status(), engines=[awake, asleep], decisions=[decision] * 9)
    text = shown(FleetStatus(broker=status)).replace("\u00a0", "")
    rows = [line.split() for line in text.splitlines() if "a request came" in line]
    assert " ".join(rows[0]) == "a 9 of 12 108MiB 0B 0% a request came"
    assert rows[1][:3] == ["b", "asleep", "0B"]
    assert text.count("10 s ago: a: take 3: it can stream these") == 3
    assert "weights of" not in shown(FleetStatus(broker=canned_status()))


def test_top_shows_what_happens_now_and_no_running_totals() -> None:
    def at(uptime_s: float, hits: float, preempted: float, pid: int = 4242) -> FleetStatus:
        stats = {
            "prefix_queries_tokens_total": 1000.0 * uptime_s,
            "prefix_hits_tokens_total": hits,
            "preemptions_total": preempted,
        }
        engines = [engine_status("a", stats=stats, pid=pid)]
        return FleetStatus(broker=replace(canned_status(), uptime_s=uptime_s, engines=engines))

    def row(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("a ")][1].split()

    before, now = at(10.0, 0.0, 100.0), at(12.0, 1000.0, 104.0)
    assert row(shown(now, before))[4:6] == ["50%", "2"]
    assert row(shown(at(12.0, 1000.0, 6.0, pid=7), before))[5] == "3", "another process began at 0"


def test_top_fits_80_columns() -> None:
    text = shown(FleetStatus(broker=canned_status()), width=80)
    memory = next(line for line in text.splitlines() if line.startswith("a ")).replace("\u00a0", "").split()
    assert memory == ["a", "serving", "192MiB", "192MiB", "160MiB", "112MiB", "32MiB", "0B"]
    assert "…" not in text
    assert "requests, beyond its share" in " ".join(text.split())


@pytest.mark.timeout(60)
def test_q_quits_top(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    with open(terminal) as keys, open("/dev/null", "w") as nowhere:
        monkeypatch.setattr(sys, "stdin", keys)
        monkeypatch.setattr(sys, "stdout", nowhere)
        os.write(controller, b"xq")
        watch(FleetStatus(broker=canned_status()), lambda: FleetStatus(broker=canned_status()), 60.0)
    os.close(controller)


def test_top_says_that_the_broker_is_away() -> None:
    assert "the broker does not answer" in shown(FleetStatus(broker=None))


def test_ctl_resizes_and_explains(short_dir: Path) -> None:
    with fake_broker(short_dir / "s", canned_status()) as resizes:
        where = ("--socket", str(short_dir / "s"))
        assert polder("ctl", "resize", "a", "5", *where).stdout == "a: pinned to 5 units\n"
        assert json.loads(polder("ctl", "resize", "a", "0", "--json", *where).stdout)["pinned_units"] == 0
        assert polder("ctl", "resize", "a", "90MiB", *where).stdout == "a: pinned to 5 units, 80 MiB\n"
        small = polder("ctl", "resize", "a", "1MiB", *where)
        unknown = polder("ctl", "resize", "zebra", "5", *where)
        words = polder("ctl", "explain", *where).stdout
        as_json = json.loads(polder("ctl", "explain", "--json", *where).stdout)
    assert resizes == [Resize(engine="a", units=5), Resize(engine="a", units=0), Resize(engine="a", units=5)]
    assert "one unit of a is 16 MiB; write that or more" in small.stderr
    assert unknown.returncode == 2
    assert "no engine 'zebra' here" in unknown.stderr
    assert "a (serving): target 12 units of 256 tokens: requests, beyond its share" in words
    assert "holds 12, 2 of them on loan" in words
    assert "holds 6, 4 of its share are lent" in words
    assert [(e["engine"], e["reason"]) for e in as_json] == [("a", "requests, beyond its share"), ("b", "floor")]


# ---------------------------------------------------------------- doctor, version


def test_doctor_says_what_is_missing_or_right() -> None:
    done = polder("doctor", "--json")
    findings = {f["check"]: f for f in json.loads(done.stdout)}
    assert set(findings) == {
        *("python", "vllm", "torch", "distribution", "plugin", "memfd", "pidfd", "unix socket", "shared memory"),
        *("open files", "memory maps", "gpu"),
    }
    assert all(f["detail"] for f in findings.values())
    assert done.returncode == (0 if all(f["ok"] for f in findings.values()) else 3)


def test_doctor_says_what_to_do() -> None:
    done = polder("doctor", VLLM_PLUGINS="other")
    assert done.returncode == 3
    assert "NO  plugin: VLLM_PLUGINS='other' leaves polder out: add it or unset the variable" in done.stdout


def test_doctor_says_that_shared_memory_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(EnvironmentFault, match="/dev/shm: Read-only file system; vLLM writes there"):
        doctor.CHECKS["shared memory"]()


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "Qwen3-8B", "--device", "H100", "--json"),
        ("plan", "Qwen3-8B", "--device", "H100", "--html"),
        ("sim", "cache", "--json"),
        ("bench", "elastic", "--json"),
        ("bench", "elastic", "--html"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_any_work(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    for path, words in ((tmp_path, "is a directory"), (tmp_path / "file" / "x.json", "cannot write")):
        done = polder(*arguments, str(path))
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_version() -> None:
    assert polder("--version").stdout == polder("version").stdout
    done = subprocess.run([sys.executable, "-m", "polder", "--version"], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("polder ")
    assert json.loads(polder("version", "--json").stdout)["works_with"] == ["0.32.0", "0.33.0"]
