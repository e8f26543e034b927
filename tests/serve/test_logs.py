"""A failure is said by its first cause, a log stays short, and what a fleet leaves behind is found again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polder.serve import logs
from polder.serve.logs import Log, first_cause, keep_logs

ENGINE = """\
INFO 11-30 10:00:00 [api_server.py:1] vLLM API server version 0.32.0
(EngineCore pid=7) INFO 11-30 10:00:01 [core.py:9] Initializing a V1 LLM engine
(EngineCore pid=7) ERROR 11-30 10:00:02 [core.py:99] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-30 10:00:02 [core.py:99] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-30 10:00:02 [core.py:99]   File "core.py", line 1, in run
(Worker pid=8) WARNING 11-30 10:00:02 [worker.py:3] shutting down: other
(EngineCore pid=7) ERROR 11-30 10:00:02 [core.py:99]     raise ValueError(
(EngineCore pid=7) ERROR 11-30 10:00:02 [core.py:99] ValueError: To serve 4096 tokens 1 GiB is needed
(EngineCore pid=7) Process EngineCore:
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7) ValueError: To serve 4096 tokens 1 GiB is needed
(APIServer pid=6) Traceback (most recent call last):
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
"""
PYDANTIC = """\
(APIServer pid=6) Traceback (most recent call last):
(APIServer pid=6)   File "x.py", line 1, in main
(APIServer pid=6) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=6)   Value error, Invalid repository ID or local directory specified: 'models/none'.
"""
CORE_IS_GONE = """\
(APIServer pid=6) WARNING 11-30 15:02:53 [core_client.py:817] [shutdown] MPClient: engine core exited unexpectedly
(APIServer pid=6) ERROR 11-30 15:02:53 [async_llm.py:906] Traceback (most recent call last):
(APIServer pid=6) ERROR 11-30 15:02:53 [async_llm.py:906]   File "core_client.py", line 1235, in get_output_async
(APIServer pid=6) ERROR 11-30 15:02:53 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore \
encountered an issue. See stack trace (above) for the root cause.
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (ENGINE, "ValueError: To serve 4096 tokens 1 GiB is needed"),
        (
            PYDANTIC,
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig "
            "Value error, Invalid repository ID or local directory specified: 'models/none'.",
        ),
        (
            "usage: vllm serve [options]\nvllm serve: error: unrecognized arguments: --enforce-eagr\n",
            "vllm serve: error: unrecognized arguments: --enforce-eagr",
        ),
        ("Traceback (most recent call last):\n  File\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("killed\n", ""),
        (CORE_IS_GONE + ENGINE, "ValueError: To serve 4096 tokens 1 GiB is needed"),
    ],
)
def test_the_first_cause_of_many_errors_is_found(text: str, cause: str) -> None:
    assert first_cause(text) == cause


def test_a_core_that_ended_without_a_traceback_was_killed() -> None:
    assert "above" not in first_cause(CORE_IS_GONE)
    assert "is killed: by hand, or by the kernel for memory" in first_cause(CORE_IS_GONE)


def test_a_cause_is_of_the_last_start(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    for text in (ENGINE, PYDANTIC):
        with log.begin() as file:
            file.write(text.encode())
    assert "ValidationError" in log.failure()
    assert str(tmp_path / "log") in log.failure()
    with log.begin() as file:
        file.write(b"one\ntwo\n")
    assert log.failure() == f". The end of {tmp_path / 'log'}:\none\ntwo"


def test_a_log_is_cut_while_its_child_writes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 1000)
    log = Log(tmp_path / "log")
    with log.begin() as child:
        for number in range(300):
            os.write(child.fileno(), f"line {number}\n".encode())
            log.shorten()
    both = (tmp_path / "log.1").read_bytes() + (tmp_path / "log").read_bytes()
    assert both.endswith(b"line 299\n")
    assert (tmp_path / "log").stat().st_size <= 1010
    assert (tmp_path / "log.1").stat().st_size <= 1010
    assert log.tail(1) == ["line 299"]


def test_logs_of_the_last_failures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    private = tmp_path / "private"
    private.mkdir()
    (private / "broker.sock").touch()
    for name in ("a.log", "a.log.1"):
        (private / name).write_text(name)
    kept = []
    for number in range(logs.KEPT + 2):
        monkeypatch.setattr(logs.time, "strftime", lambda _, n=number: f"2026-{n}")
        kept.append(keep_logs(private))
    assert {path.name: path.read_text() for path in kept[-1].iterdir()} == {"a.log": "a.log", "a.log.1": "a.log.1"}
    assert [path.exists() for path in kept] == [False] * 2 + [True] * logs.KEPT


def test_logs_that_cannot_be_copied_are_named_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert keep_logs(tmp_path) == tmp_path
