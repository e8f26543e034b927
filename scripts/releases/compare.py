"""What a release of vLLM changes for Polder: `scripts/compare-vllm [WHEEL | FOLDER | VERSION | newest]`.

Reads both releases as text, so neither has to be installable here, and compares

    seams     every name of compat.SEAMS: its parameters with what compat expects, its body with the older release
    imports   every `from vllm... import`: still there; the parameters of functions and of a class's methods
    private   names with a leading underscore that Polder reads from objects of vLLM's: still anywhere in the modules above

The older release is the installed one. A report, not a verdict: the status is 0 whatever was found, and 2 when nothing could be
compared. A changed body may be harmless and an equal one may mean something else; a person reads `--diff` and decides.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import polder
from polder.engines.vllm.compat import CHANGES, TESTED, seams_of
from polder.errors import EnvironmentFault
from scripts.releases.sources import Definition, Package, folder_reader, index_wheel, parameters_of, wheel_reader

__all__ = ["Finding", "compare", "main"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One difference."""

    kind: str
    """"seam", "body", "import" or "private"."""
    name: str
    what: str
    diff: str = ""


@dataclass(frozen=True, kw_only=True)
class Use:
    """What Polder's own sources take from vLLM."""

    imports: frozenset[tuple[str, str]]
    """Module and name; an empty name: the module itself."""
    private: frozenset[str]


def uses_of(sources: Path) -> Use:
    """Reads all of Polder's modules below `sources`."""
    imports: set[tuple[str, str]] = set()
    read: set[str] = set()
    own: set[str] = set()
    for path in sorted(sources.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "vllm":
                    imports |= {(module, alias.name) for alias in node.names}
                case ast.Import():
                    imports |= {(a.name, "") for a in node.names if a.name.partition(".")[0] == "vllm"}
                case ast.Attribute(value=ast.Name(id="self" | "cls")):
                    own.add(node.attr)
                case ast.Attribute() if node.attr.startswith("_") and not node.attr.startswith("__"):
                    read.add(node.attr)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    own.add(node.name)
    return Use(imports=frozenset(imports), private=frozenset(read - own))


def compare(old: Package, new: Package, version: str, use: Use) -> Iterator[Finding]:
    """All that differs in `new`, which is the release `version`, from `old` and from what compat expects."""
    for module, dotted, parameters in seams_of(version):
        found, before = new.find(module, dotted), old.find(module, dotted)
        name = f"{module}.{dotted}"
        if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Finding(kind="seam", name=name, what="is gone" if found is None else "is not a function any more")
        elif parameters_of(found) != parameters:
            yield Finding(kind="seam", name=name, what=_changed(parameters, parameters_of(found)))
        if found is not None and before is not None and _text(found) != _text(before):
            diff = _diff(before, found)
            yield Finding(kind="body", name=name, what=_count(diff), diff="\n".join(diff))
    for module, imported in sorted(use.imports):
        yield from _compare_import(old, new, module, imported)
    missing = sorted((use.private & old.names()) - new.names())
    yield from (Finding(kind="private", name=name, what="is gone from the modules above") for name in missing)


def _compare_import(old: Package, new: Package, module: str, name: str) -> Iterator[Finding]:
    label = f"{module}.{name}" if name else module
    if not name or old.module(f"{module}.{name}") is not None:
        if old.module(label) is not None and new.module(label) is None:
            yield Finding(kind="import", name=label, what="is gone")
        return
    before, found = old.find(module, name), new.find(module, name)
    if found is None:
        if before is not None:
            yield Finding(kind="import", name=label, what="is gone")
        return
    for part, parameters in _signatures(before).items():
        now = _signatures(found).get(part)
        if now != parameters:
            what = "is gone" if now is None else _changed(parameters, now)
            yield Finding(kind="import", name=f"{label}{part}", what=what)
    for part in _abstract(found) - _abstract(before):
        yield Finding(kind="import", name=f"{label}.{part}", what="is abstract now: whoever inherits it must have it")


def _signatures(node: Definition | None) -> dict[str, tuple[str, ...]]:
    """Parameters of a function, of a class's methods, and the fields of a dataclass (as those of "()")."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return {"": parameters_of(node)}
        case ast.ClassDef():
            functions = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            fields = tuple(
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            )
            return {f".{part.name}": parameters_of(part) for part in functions} | ({"()": fields} if fields else {})
    return {}


def _abstract(node: Definition | None) -> set[str]:
    parts = node.body if isinstance(node, ast.ClassDef) else []
    functions = [part for part in parts if isinstance(part, ast.FunctionDef)]
    return {f.name for f in functions if any("abstract" in ast.unparse(decorator) for decorator in f.decorator_list)}


def _text(node: ast.AST) -> str:
    """The code without comments and docstrings, which change nothing."""
    copy = ast.parse(ast.unparse(node))
    for part in ast.walk(copy):
        if (
            isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(part) is not None
        ):
            part.body = part.body[1:] or [ast.Pass()]
    return ast.unparse(copy)


def _diff(before: ast.AST, after: ast.AST) -> list[str]:
    lines = difflib.unified_diff(_text(before).splitlines(), _text(after).splitlines(), lineterm="", n=2)
    return list(lines)[2:]


def _count(diff: list[str]) -> str:
    return f"+{sum(line.startswith('+') for line in diff)} -{sum(line.startswith('-') for line in diff)} lines"


def _changed(expected: tuple[str, ...], found: tuple[str, ...]) -> str:
    news = [f"+{name}" for name in found if name not in expected] + [
        f"-{name}" for name in expected if name not in found
    ]
    return f"parameters {' '.join(news)}" if news else f"parameters in another order: {', '.join(found)}"


# ---------------------------------------------------------------- the command


def _installed() -> tuple[str, Package]:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault("no vLLM is installed to compare with: run scripts/setup, or give --against")
    return _open(str(Path(spec.submodule_search_locations[0]).parent))


def _open(source: str) -> tuple[str, Package]:
    """The release and its sources, of a wheel, a folder with the package in it, or a version on pip's index."""
    path = Path(source)
    if path.is_dir():
        read = folder_reader(path)
        return _version_of(read("vllm/_version.py") or ""), Package(read)
    if path.is_file():
        return path.name.split("-")[1].partition("+")[0], Package(wheel_reader(zipfile.ZipFile(path)))
    version, archive = index_wheel("vllm" if source == "newest" else f"vllm=={source}")
    return version, Package(wheel_reader(archive))


def _version_of(text: str) -> str:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names or "version" in names:
                return node.value.value.partition("+")[0]
    return "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/compare-vllm", description="What a release of vLLM changes for Polder."
    )
    parser.add_argument("release", nargs="?", default="newest", help="a wheel, a folder, a version, or: newest")
    parser.add_argument(
        "--against", help="the older release: a wheel, a folder or a version (default: the installed one)"
    )
    parser.add_argument("--diff", action="store_true", help="print what changed in the bodies")
    given = parser.parse_args(arguments)
    try:
        before, old = _open(given.against) if given.against else _installed()
        version, new = _open(given.release)
        findings = list(compare(old, new, version, uses_of(Path(polder.__file__).parent)))
    except EnvironmentFault as error:
        print(f"compare-vllm: {error}", file=sys.stderr)
        return 2
    standing = TESTED.get(version, "not in compat.TESTED: Polder refuses it")
    print(f"vLLM {version} against {before}; {version}: {standing}")
    for change in (c for c in CHANGES if c.since == version):
        print(f"  known    {change.name}: {change.reason}")
    for finding in findings:
        print(f"  {finding.kind:8} {finding.name}: {finding.what}")
        if given.diff and finding.diff:
            print(finding.diff)
    if not findings:
        print("  nothing that Polder uses has changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
