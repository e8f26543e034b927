"""What is built can be installed by itself: without extras each verb answers, or says what to install."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from polder.cli.doctor import CHECKS
from polder.errors import EnvironmentFault
from tests.serve.test_cli import polder

ROOT = Path(__file__).parents[2]
RUN = """
import contextlib, io, json, sys
from polder.cli.main import main
answers = []
for words in json.load(sys.stdin):
    sys.argv = ["polder", *words]
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            main()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        code = repr(error)
    answers.append((code, text.getvalue()))
print(json.dumps(answers))
"""


def needed(requirements: list[str] | None, found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """What these requirements bring without extras, as it is installed beside the tests."""
    for text in requirements or []:
        requirement = Requirement(text)
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and requirement.name not in found:
            found[requirement.name] = metadata.distribution(requirement.name)
            needed(found[requirement.name].requires, found)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, which is built from the sdist, and its dependencies alone.

    The dependencies are those of this environment, linked: an index is not asked.
    """
    folder = tmp_path_factory.mktemp("built")

    def run(*command: str, where: Path = folder) -> None:
        done = subprocess.run([sys.executable, "-m", *command], cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("hatchling", "build", "-t", "sdist", "-d", str(folder), where=ROOT)
    (sdist,) = folder.glob("polder_kv-*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(folder, filter="data")
    run("hatchling", "build", "-t", "wheel", "-d", str(folder), where=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("polder_kv-*.whl")
    run("venv", "--without-pip", "venv")
    python = folder / "venv" / "bin" / "python"
    run("pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps", "--no-compile", str(wheel))
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own,) = metadata.distributions(path=[str(packages)])
    for distribution in needed(own.requires, {}).values():
        for name in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            (packages / name).symlink_to(str(distribution.locate_file(name)))
    return python


@pytest.fixture(scope="module")
def broker(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    socket = tmp_path_factory.mktemp("b") / "s"
    command = [str(installed.with_name("polder")), "broker", "--socket", str(socket), "--device", "cpu:0=16MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not socket.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        yield socket
        process.terminate()


def test_each_verb_answers_without_extras_or_says_what_to_install(
    installed: Path, broker: Path, tmp_path: Path
) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**config, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 512, "vocab_size": 9}
        )
    )
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[memory]\nkv_budget = "64MiB"\n[[model]]\nname = "a"\npath = "{tmp_path}"\n')
    at = ("--socket", str(broker))
    expected: dict[tuple[str, ...], tuple[int, str]] = {
        ("version",): (0, "vLLM not installed"),
        ("doctor",): (3, "NO  vllm: not installed: "),
        ("top", "--once", *at): (0, "cpu:0"),
        ("ctl", "explain", *at): (0, ""),
        ("ctl", "sleep", "a", *at): (2, "no engine 'a' here"),
        ("serve", str(fleet), "--check"): (2, "NO  vLLM: not installed: pip install 'polder-kv[serve,gpu]'"),
        ("serve", str(fleet)): (3, "pip install 'polder-kv[serve,gpu]'"),
        ("broker", *at, "--device", "cpu:0=16MiB"): (3, "already listens"),
        ("plan", str(tmp_path), "--device", "h100"): (0, "TTFT"),
        ("plan", str(tmp_path), "--device", "here"): (3, "pip install 'polder-kv[gpu]'"),
        ("bench",): (3, "pip install 'polder-kv[bench,gpu]'"),
        **{
            ("bench", bench, "--json", "x"): (3, "pip install 'polder-kv[bench,gpu]'")
            for bench in ("context", "disks", "elastic", "tenants", "turns")
        },
        ("sim", "cache"): (3, "pip install 'polder-kv[bench]'"),
        ("fsck", str(tmp_path)): (3, "not checked"),
    }
    verbs = (
        "serve",
        "init",
        "broker",
        "top",
        "ctl",
        "ctl resize",
        "ctl wake",
        "plan",
        "sim",
        "doctor",
        "fsck",
        "version",
    )
    helps = [[*verb.split(), "--help"] for verb in verbs]
    done = subprocess.run(
        [installed, "-I", "-c", RUN], input=json.dumps([*expected, *helps]), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for (words, (code, text)), (got, said) in zip(expected.items(), answers[: len(expected)], strict=True):
        assert (got, text in said) == (code, True), f"{words}: {got}: {said}"
    assert all(code == 0 and "Usage" in said for code, said in answers[len(expected) :])


def test_the_other_package_called_polder_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0")
    with pytest.raises(EnvironmentFault, match="pip uninstall polder"):
        CHECKS["distribution"]()
    done = polder("doctor")
    assert "NO  distribution: " in done.stdout
