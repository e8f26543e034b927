"""The command line is public: verbs, flags, output and exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
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
from polder.cli.view import render
from polder.errors import EnvironmentFault
from polder.serve.child import ChildStatus
from polder.serve.supervisor import FleetStatus
from tests.serve.fakes import canned_status, engine_status, fake_broker
from tests.serve.test_fleet import GOOD, model, write

__all__ = ["model"]

SURFACE = {
    "serve": {"fleet", "--check", "--socket", "--log-dir", "--json"},
    "broker": {"--socket", "--device", "--page", "--reserve-low", "--reserve-high", "--hold", "--deadline"},
    "top": {"--socket", "--url", "--once", "--json", "--interval"},
    "ctl resize": {"engine", "units", "--socket", "--json"},
    "ctl add": {"model", "--socket", "--json"},
    "ctl remove": {"model", "--socket", "--json"},
    "ctl restart": {"model", "--socket", "--json"},
    "ctl explain": {"--socket", "--json"},
    "ctl sleep": {"engine", "--socket", "--json"},
    "ctl wake": {"engine", "--socket", "--json"},
    "ctl stream": {"engine", "layers", "--socket", "--json"},
    "plan": {
        *("model", "--device", "--host", "--neighbours", "--link", "--context", "--window", "--chunk", "--tbt-goal"),
        *("--json", "--html"),
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
    golden = {"broker": {"t": "status", **msgspec.to_builtins(canned_status())}, "children": []}
    assert json.loads(by_option) == json.loads(by_environment) == golden
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


def shown(snapshot: FleetStatus) -> str:
    with open("/dev/null", "w") as nowhere:
        console = Console(width=160, record=True, file=nowhere)
        console.print(render(snapshot))
    return console.export_text()


def test_top_shows_who_holds_what_and_why() -> None:
    down = ChildStatus(name="b", state="down", pid=None, restarts=4, retry_in_s=2.0, last_exit="ended with code 137")
    text = shown(FleetStatus(broker=canned_status(), children=[down]))
    lines = text.splitlines()
    assert lines[0].count("█") == 54
    assert lines[0].count("░") == 6, "the bar has its length"
    assert "a/kv 192 MiB  b/kv 96 MiB  free 32 MiB" in text
    memory = next(line for line in lines if line.startswith("a ")).replace("\u00a0", "").split()
    sizes = ("192MiB", "32MiB", "160MiB", "288MiB", "112MiB", "16MiB", "144MiB", "32MiB", "0B", "48MiB", "192MiB")
    assert memory == ["a", "serving", *sizes]
    requests = [line for line in lines if line.startswith("a ")][1].split(maxsplit=8)
    assert [word.strip() for word in requests] == [
        *["a", "3", "2", "58%", "64%", "1", "12", "12"],
        "requests, beyond its share",
    ]
    assert "5 grants   3 recalls   1 overdue   give-back p50 30 ms, p99 150 ms (last 3)" in text
    assert "b is down, restarts 4 ended with code 137" in text


def test_top_shows_weights_and_what_was_decided_last() -> None:
    stats = {"wakes_total": 3.0, "sleeps_total": 4.0, "pauses_total": 1.0, "wake_seconds_total": 0.25}
    weights = {"layers": 12, "layer_pages": 6, "weights_reason": "a request came", "stats": stats}
    awake, asleep = engine_status("a", segments=9, **weights), engine_status("b", asleep=True, **weights)
    decision = Decision(uptime_s=51.5, engine="a", action="take", segments=3, reason="it can stream these")
    status = replace(canned_status(), engines=[awake, asleep], decisions=[decision] * 9)
    text = shown(FleetStatus(broker=status)).replace("\u00a0", "")
    rows = [line.split() for line in text.splitlines() if "a request came" in line]
    assert " ".join(rows[0]) == "a 9 of 12 108MiB 4 3 1 0.25s 0B 0.00s a request came"
    assert rows[1][:3] == ["b", "asleep", "0B"]
    assert text.count("10 s ago: a: take 3: it can stream these") == 3
    assert "weights of" not in shown(FleetStatus(broker=canned_status()))


def test_top_says_that_the_broker_is_away() -> None:
    assert "the broker does not answer" in shown(FleetStatus(broker=None))


def test_ctl_resizes_and_explains(short_dir: Path) -> None:
    with fake_broker(short_dir / "s", canned_status()) as resizes:
        where = ("--socket", str(short_dir / "s"))
        assert polder("ctl", "resize", "a", "5", *where).stdout == "a: pinned to 5 units\n"
        assert json.loads(polder("ctl", "resize", "a", "0", "--json", *where).stdout)["pinned_units"] == 0
        unknown = polder("ctl", "resize", "zebra", "5", *where)
        words = polder("ctl", "explain", *where).stdout
        as_json = json.loads(polder("ctl", "explain", "--json", *where).stdout)
    assert resizes == [Resize(engine="a", units=5), Resize(engine="a", units=0)]
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


def test_version() -> None:
    assert json.loads(polder("version", "--json").stdout)["works_with"] == ["0.32.0", "0.33.0"]
