"""A release is compared by reading it: what Polder uses and what has changed there is found, and nothing else is said."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.releases import compare
from scripts.releases.compare import Use, uses_of
from scripts.releases.sources import Package, folder_reader, parameters_of, wheel_reader

OLD = {
    "vllm/_version.py": "__version__ = version = '1.0'",
    "vllm/core.py": "from vllm.planning import plan\nfrom .base import Base\n",
    "vllm/planning.py": "def plan(config, memory):\n    '''Plans.'''\n    return config\n",
    "vllm/base.py": "class Base:\n    def step(self, n):\n        return self._left + n\n",
    "vllm/engine/__init__.py": "from .loop import Loop\n",
    "vllm/engine/loop.py": "from ..base import Base\nclass Loop(Base):\n    def run(self): pass\n",
}
SEAMS = (("vllm.core", "plan", ("config", "memory")), ("vllm.engine", "Loop.step", ("self", "n")))
USE = Use(
    imports=frozenset({("vllm.core", "Base"), ("vllm.engine", "Loop"), ("vllm.core", "")}), private=frozenset({"_left"})
)


def package(folder: Path, changed: dict[str, str]) -> Package:
    for path, text in (OLD | changed).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if text:
            (folder / path).write_text(text)
    return Package(folder_reader(folder))


def findings(tmp_path: Path, changed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    monkeypatch.setattr(compare, "seams_of", lambda version: SEAMS)
    old, new = package(tmp_path / "old", {}), package(tmp_path / "new", changed)
    return [(found.kind, found.name, found.what) for found in compare.compare(old, new, "1.1", USE)]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"vllm/planning.py": "def plan(config, memory):\n    # why\n    return config\n"}, []),
        (
            {
                "vllm/core.py": "from vllm.moved import plan\nfrom .base import Base\n",
                "vllm/moved.py": OLD["vllm/planning.py"],
            },
            [],
        ),
        (
            {"vllm/planning.py": "def plan(config, memory):\n    return memory\n"},
            [("body", "vllm.core.plan", "+1 -1 lines")],
        ),
        (
            {"vllm/planning.py": "def plan(config, memory, groups):\n    return config\n"},
            [("seam", "vllm.core.plan", "parameters +groups"), ("body", "vllm.core.plan", "+1 -1 lines")],
        ),
        ({"vllm/core.py": "from .base import Base\n"}, [("seam", "vllm.core.plan", "is gone")]),
        ({"vllm/core.py": "from .base import Base\nplan = print\n"}, None),
        (
            {"vllm/base.py": "class Base:\n    def step(self, m, n):\n        return self._left + n\n"},
            [
                ("seam", "vllm.engine.Loop.step", "parameters +m"),
                ("body", "vllm.engine.Loop.step", "+1 -1 lines"),
                ("import", "vllm.core.Base.step", "parameters +m"),
            ],
        ),
        (
            {"vllm/base.py": OLD["vllm/base.py"].replace("_left", "_right")},
            [("body", "vllm.engine.Loop.step", "+1 -1 lines"), ("private", "_left", "is gone from the modules above")],
        ),
        (
            {"vllm/base.py": OLD["vllm/base.py"] + "    @abstractmethod\n    def stop(self): ...\n"},
            [("import", "vllm.core.Base.stop", "is abstract now: whoever inherits it must have it")],
        ),
        (
            {"vllm/engine/__init__.py": "x = 1\n"},
            [("seam", "vllm.engine.Loop.step", "is gone"), ("import", "vllm.engine.Loop", "is gone")],
        ),
    ],
)
def test_what_changed_is_found_and_nothing_else(
    changed: dict[str, str],
    expected: list[tuple[str, str, str]] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = findings(tmp_path, changed, monkeypatch)
    if expected is None:
        assert ("seam", "vllm.core.plan", "is not a function any more") in found
    else:
        assert found == expected


def test_a_wheel_is_read_without_unpacking_it(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in OLD.items():
            archive.writestr(path, text)
    with zipfile.ZipFile(wheel) as archive:
        found = Package(wheel_reader(archive)).find("vllm.engine", "Loop.step")
        assert isinstance(found, ast.FunctionDef)
        assert parameters_of(found) == ("self", "n")


def test_polder_s_own_imports_and_private_names_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import vllm.v1.core as core\nfrom vllm.x import Y, Z as W\nimport numpy\n"
        "class A:\n    def _own(self):\n        self._mine = 1\n\ndef f(s, a):\n    return s._theirs, a._own, a._mine, a.public\n"
    )
    use = uses_of(tmp_path)
    assert use.imports == {("vllm.v1.core", ""), ("vllm.x", "Y"), ("vllm.x", "Z")}
    assert use.private == {"_theirs"}


def test_the_installed_release_does_not_differ_from_itself() -> None:
    """The whole command, in a process that imports no vLLM."""
    code = "import sys; from scripts.releases.compare import main; main(sys.argv[1:]); assert 'vllm' not in sys.modules"
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no vLLM is installed")
    folder = str(Path(spec.origin).parents[1])
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing that Polder uses has changed" in done.stdout


def test_what_cannot_be_read_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    assert compare.main(["0.0"]) == 2
    assert "no vLLM is installed to compare with" in capsys.readouterr().err
