"""The harness of these tests: engines end with all that is theirs, and take nothing of others with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gpulike
import psutil
import pytest

from tests.engines import harness
from tests.engines.harness import TINY, Engine, prompts
from tests.engines.segments import segments_of

SEGMENT = """
import sys, mmap, os
sys.stdin.readline()
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.ftruncate(descriptor, 4096)
if sys.argv[2] == "mapped":
    memory = mmap.mmap(descriptor, 4096)
    os.close(descriptor)
print("ready", flush=True)
sys.stdin.read()
"""


class Stranger:
    """A process that holds a segment from `begin` to `end`."""

    def __init__(self, name: str, how: str) -> None:
        self.segment = Path("/dev/shm", f"pt-{os.getpid()}-{name}")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SEGMENT, str(self.segment), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def begin(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"begin\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"ready\n"

    def end(self) -> None:
        self.process.communicate()
        self.segment.unlink(missing_ok=True)


@pytest.fixture
def strangers() -> Iterator[list[Stranger]]:
    started: list[Stranger] = []
    yield started
    for each in started:
        each.end()


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_segments_are_found_by_who_holds_them(how: str, strangers: list[Stranger]) -> None:
    strangers += [Stranger("ours", how), Stranger("theirs", how)]
    ours, theirs = strangers
    ours.begin()
    theirs.begin()
    assert segments_of([ours.process.pid]) == {ours.segment}
    assert segments_of([ours.process.pid, theirs.process.pid]) == {ours.segment, theirs.segment}


@pytest.mark.engine
def test_a_killed_engine_leaves_nothing_and_a_segment_of_others_stays(
    monkeypatch: pytest.MonkeyPatch, strangers: list[Stranger]
) -> None:
    stranger, register = Stranger("meanwhile", "mapped"), harness.plugin.register
    strangers.append(stranger)

    def register_and_meanwhile() -> None:
        register()
        if not stranger.segment.exists():
            stranger.begin()

    monkeypatch.setattr(harness.plugin, "register", register_and_meanwhile)
    engine = Engine.start("killed", settings={"POLDER_KV_BUDGET": "80MiB", "POLDER_PAGE": f"{harness.PAGE}B"})
    processes = engine.processes()
    sockets = engine._sockets
    assert sockets is not None
    assert list(sockets.iterdir())
    engine.generate(prompts(1, 40), tokens=2)
    os.kill(engine.core_pid(), signal.SIGKILL)
    engine.stop()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert not sockets.exists()
    assert engine._segments, "vLLM's message queues: without any the test shows nothing"
    assert not any(segment.exists() for segment in engine._segments)
    assert stranger.segment.exists()


@pytest.mark.parametrize("like", ["v1", "graphs", "v2,graph", "late,uni"])
def test_words_of_the_rig_that_mean_nothing_are_refused(like: str) -> None:
    with pytest.raises(ValueError, match="gpulike"):
        gpulike.environment(like)


@pytest.mark.engine
def test_a_model_is_not_compiled_and_eager_at_once() -> None:
    with pytest.raises(ValueError, match="enforce_eager=False"):
        Engine.start("gpulike", TINY, like="v2,async,uni,compiled", enforce_eager=True)
