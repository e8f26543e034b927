"""The scripts for a GPU's first quarter of an hour run: on the fake driver, where they need no vLLM."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.memory.machines import LIBRARY, build_fakecuda

RUN = Path(__file__).parents[2] / "scripts" / "gpu" / "run"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {LIBRARY: str(build_fakecuda(tmp_path_factory.mktemp("driver")))}


def run(out: Path, environment: dict[str, str], *options: str) -> str:
    command = [sys.executable, str(RUN), "--device", "fake", "--tiny", "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_stages_without_vllm_run_on_the_fake_driver_and_are_not_run_again(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    printed = run(tmp_path, environment, "--only", "vmm,order,copies,elastic")
    results = {result["stage"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    assert {name: result["status"] for name, result in results.items()} == {
        **dict.fromkeys(("vmm", "order", "copies"), "right"),
        "elastic": "skipped",
    }
    assert results["order"]["figures"]["a copy after a mark has what was computed"] is True
    assert results["vmm"]["figures"]["create, us a page"] > 0
    assert printed.splitlines()[-1].startswith("elastic  skipped"), "the results come last"
    again = run(tmp_path, environment, "--only", "vmm,order,copies")
    assert "== vmm" not in again
    assert json.loads((tmp_path / "results.json").read_text())[0] == results["vmm"]


def test_a_stage_that_is_stopped_at_its_limit_is_not_taken_for_right(tmp_path: Path) -> None:
    script = loaded()
    given = argparse.Namespace(device="fake", tiny=True, out=tmp_path, models=tmp_path)
    assert script.run_stage("vmm", 0.01, given)["status"] == "stopped at its limit"
    assert script._before(argparse.Namespace(**vars(given), again=False), "vmm") is None


def loaded() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("gpu_run", str(RUN))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_run", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module
