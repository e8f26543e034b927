"""A fleet of real engines while models come, go, are killed and started again: requests to another model never notice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from polder.bench.harness.engines import EnginePlan, a_core_each, fleet_toml
from polder.serve.process import free_port
from tests.engines.harness import MODELS, RIG, SMALL_A, SMALL_B, prompts
from tests.engines.segments import segments_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
MIB = 1 << 20
TOKENS = 24
LIMIT_S = 1200
ASKED = prompts(4, 60, vocabulary=SMALL_A.vocab)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """An engine takes a quarter of a minute to start, on a busy machine several minutes."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.5)


def plans() -> list[EnginePlan]:
    return a_core_each(
        [
            EnginePlan(
                name=name,
                recipe=recipe,
                models=MODELS,
                max_model_len=1024,
                share_bytes=24 * MIB,
                batched_tokens=256,
                memory={"page": MIB // 4},
            )
            for name, recipe in (("witness", SMALL_B), ("a", SMALL_A))
        ]
    )


class Fleet:
    """`polder serve` whose output nobody reads after the first line, with folders of its own for all that it makes."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.port, self.file, self.temporary = free_port(), folder / "fleet.toml", folder / "tmp"
        self.temporary.mkdir()
        (folder / "cwd").mkdir()
        for name in ("queue.py", "token.py", "random.py"):
            (folder / "cwd" / name).write_text("raise SystemExit('shadowed')")
        own = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(folder / "state")}
        self._environment = {**os.environ, **own, "TMPDIR": str(self.temporary)}
        paths = os.environ["PYTHONPATH"].split(os.pathsep)  # without the other platform of other tests
        self._environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path != str(RIG))
        self.segments: set[Path] = set()
        self.write("witness")
        self.process = psutil.Popen(
            [sys.executable, "-P", "-m", "polder.cli.main", "serve", str(self.file)],
            cwd=folder / "cwd",
            env=self._environment,
            stderr=subprocess.PIPE,
        )
        self.process.stderr.readline()
        self.process.stderr.close()

    def write(self, *names: str, change: tuple[str, str] = ("", "")) -> None:
        """The fleet file with these models; the budget is always that of both."""
        text = fleet_toml(plans(), self.port)
        head, witness, a = text.split("\n[[model]]")
        models = {"witness": witness, "a": a.replace(*change)}
        self.file.write_text("\n[[model]]".join([head, *(models[name] for name in names)]))

    def ctl(self, *words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "polder.cli.main", "ctl", *words]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def ask(self, model: str, prompt: list[int]) -> list[int]:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        answer = httpx.post(url, json=body | {"return_token_ids": True}, trust_env=False, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def answers(self, model: str) -> list[list[int]]:
        return [self.ask(model, prompt) for prompt in ASKED]

    def states(self) -> dict[str, tuple[str, int]]:
        """Each child's state and restarts; none before the endpoint answers."""
        with suppress(httpx.TransportError):
            found = httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False, timeout=60).json()["children"]
            return {child["name"]: (child["state"], child["restarts"]) for child in found}
        return {}

    def kill(self, name: str, process: str) -> None:
        """kill -9 of a process of this child, by a word of its name."""
        found = httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False, timeout=60).json()["children"]
        (guard,) = (child["pid"] for child in found if child["name"] == name)
        below = psutil.Process(guard).children(recursive=True)
        next(child for child in below if process in child.name() + " ".join(child.cmdline())).kill()

    def tree(self) -> list[psutil.Process]:
        found = self.process.children(recursive=True)
        self.segments |= segments_of(process.pid for process in found)
        return list(found)


@pytest.fixture
def fleet(tmp_path: Path, short_dir: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, short_dir)
    yield fleet
    if fleet.process.is_running():
        tree = fleet.tree()
        fleet.process.kill()
        fleet.process.wait()
        psutil.wait_procs(tree, timeout=60)
    for path in fleet.segments:
        path.unlink(missing_ok=True)


def test_requests_to_one_model_never_notice_what_happens_to_another(fleet: Fleet, short_dir: Path) -> None:
    wait_for(lambda: fleet.states().get("witness") == ("ready", 0), "the fleet")
    expected = fleet.answers("witness")
    faults: list[str] = []
    rounds, ended = 0, threading.Event()

    def bear_witness() -> None:
        nonlocal rounds
        while not ended.wait(0.5):
            try:
                if fleet.answers("witness") != expected:
                    faults.append("other tokens")
            except (AssertionError, httpx.HTTPError) as error:
                faults.append(repr(error))
            fleet.tree()
            rounds += 1

    witness = threading.Thread(target=bear_witness)
    witness.start()
    try:
        fleet.write("witness", "a", change=("--enforce-eager", "--enforce-eagr"))
        code, words = fleet.ctl("add", "a")
        assert (code, "did you mean --enforce-eager?" in words, len(fleet.states())) == (2, True, 2), words
        fleet.write("witness", "a")
        assert fleet.ctl("add", "a") == (0, "a: ready\n")
        of_a = fleet.answers("a")

        (place,) = (short_dir / "polder").iterdir()
        shutil.rmtree(place)
        wait_for(lambda: (place / "broker.sock.ctl").exists() and fleet.ctl("explain")[0] == 0, "orders to be taken")
        fleet.kill("a", "EngineCore")
        wait_for(lambda: fleet.states()["a"][0] == "down", "the death to be noticed")
        wait_for(lambda: any("EngineCore" in process.name() for process in fleet.tree()[-4:]), "it to load")
        assert fleet.ctl("restart", "a") == (0, "a: ready\n"), "it is stopped while it loads"
        assert fleet.answers("a") == of_a
        assert list(place.glob("vllm_dist_*")), "not in /tmp"

        fleet.kill("broker", "polder.cli.main")
        wait_for(lambda: fleet.states()["broker"] == ("ready", 2), "another broker")
        assert fleet.answers("a") == of_a
        assert fleet.ctl("remove", "a") == (0, "a: removed\n")
        with pytest.raises(AssertionError, match="`a` does not exist"):
            fleet.ask("a", ASKED[0])
        seen = rounds
        wait_for(lambda: rounds > seen + 1, "the witness")
    finally:
        ended.set()
        witness.join()
    assert not faults
    tree = fleet.tree()
    fleet.process.send_signal(signal.SIGTERM)
    assert fleet.process.wait(120) == 0
    assert not [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not [path for path in fleet.segments if path.exists()]
    assert list(short_dir.iterdir()) == []
    # What PyTorch has compiled is kept for the next start.
    assert [path for path in fleet.temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
