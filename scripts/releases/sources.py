"""Python packages read as text: what a module defines, with which parameters, found without importing anything.

A package is a folder, a wheel, or a wheel on an index of which only the modules asked for are fetched. Names are followed through
`from x import y` and base classes, as far as they lead within the package.
"""

from __future__ import annotations

import ast
import contextlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from polder.errors import EnvironmentFault

__all__ = ["Definition", "Package", "Reader", "folder_reader", "index_wheel", "parameters_of", "wheel_reader"]

FETCH_BYTES = 512 << 10
"""Of a wheel on an index at a time."""
INDEX_TIMEOUT_S = 60.0
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef | ast.Assign | ast.AnnAssign


class Reader(Protocol):
    def __call__(self, path: str) -> str | None:
        """The text of "a/b.py" below the package's parent; None when there is no such file."""


@dataclass
class Package:
    """One release of a package. Modules are parsed when they are first asked for."""

    read: Reader
    _modules: dict[str, ast.Module | None] = field(default_factory=dict)

    def module(self, name: str) -> ast.Module | None:
        """The parsed module, or None when the package has none of this name."""
        if name not in self._modules:
            path = name.replace(".", "/")
            text = self.read(f"{path}.py")
            text = self.read(f"{path}/__init__.py") if text is None else text
            self._modules[name] = None if text is None else ast.parse(text)
        return self._modules[name]

    def find(self, module: str, dotted: str) -> Definition | None:
        """The definition of `dotted` ("function", "Class.method") that `module` sees under that name."""
        first, _, rest = dotted.partition(".")
        where, found = self._find_top(module, first)
        if not rest or found is None:
            return found
        return self._find_member(where, found, rest) if isinstance(found, ast.ClassDef) else None

    def _find_top(self, module: str, name: str, depth: int = 8) -> tuple[str, Definition | None]:
        tree = self.module(module)
        if tree is None or not depth:
            return module, None
        for node in _statements(tree.body):
            if _defines(node, name):
                assert isinstance(node, Definition)
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._find_top(self._imported_from(module, node), alias.name, depth - 1)
        return module, None

    def _imported_from(self, module: str, node: ast.ImportFrom) -> str:
        """The module that a statement in `module` names; dots lead upwards from the package that `module` is, or is in."""
        if not node.level:
            return node.module or ""
        is_package = self.read(f"{module.replace('.', '/')}/__init__.py") is not None
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _find_member(self, module: str, owner: ast.ClassDef, name: str, depth: int = 8) -> Definition | None:
        for node in _statements(owner.body):
            if _defines(node, name):
                assert isinstance(node, Definition)
                return node
        for base in owner.bases if depth else ():
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                where, found = self._find_top(module, base.id)
                member = self._find_member(where, found, name, depth - 1) if isinstance(found, ast.ClassDef) else None
                if member is not None:
                    return member
        return None

    def names(self) -> set[str]:
        """Every attribute and definition in the modules that were asked for so far."""
        found: set[str] = set()
        for tree in self._modules.values():
            for node in ast.walk(tree) if tree is not None else ():
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Name):
                    found.add(node.id)
        return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """With those under `if TYPE_CHECKING`, `try` and the like, which define names of the module, too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)


def _defines(node: ast.stmt, name: str) -> bool:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node.name == name
        case ast.Assign():
            return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        case ast.AnnAssign():
            return isinstance(node.target, ast.Name) and node.target.id == name
    return False


def parameters_of(function: Function) -> tuple[str, ...]:
    """Names of all parameters, in the order of `inspect.signature`."""
    given = function.args
    plain = [*given.posonlyargs, *given.args, *([given.vararg] if given.vararg else []), *given.kwonlyargs]
    return tuple(argument.arg for argument in [*plain, *([given.kwarg] if given.kwarg else [])])


def folder_reader(parent: Path) -> Reader:
    """Reads the package that lies in `parent`."""

    def read(path: str) -> str | None:
        file = parent / path
        return file.read_text() if file.is_file() else None

    return read


def wheel_reader(archive: zipfile.ZipFile) -> Reader:
    names = set(archive.namelist())
    return lambda path: archive.read(path).decode() if path in names else None


def index_wheel(requirement: str) -> tuple[str, zipfile.ZipFile]:
    """The version and the wheel that pip would install for `requirement`, of which only what is read is fetched.

    Goes through pip: its index, proxies, certificates and credentials. Raises EnvironmentFault when pip finds none, or when
    the index cannot send parts of files.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    try:
        done = subprocess.run(
            [*command, "--report", "-", requirement], capture_output=True, timeout=INDEX_TIMEOUT_S, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout)["install"][0]
    except (subprocess.SubprocessError, ValueError, LookupError) as error:
        raise EnvironmentFault(f"pip finds no {requirement}: {error}") from error
    with contextlib.ExitStack() as undo:
        try:
            # Private parts of pip, since it has no public way to read a part of a wheel.
            from pip._internal.commands import create_command
            from pip._internal.network.lazy_wheel import LazyZipOverHTTP

            pip: Any = create_command("download")
            options, _ = pip.parse_args([])
            undo.enter_context(pip.main_context())
            file: Any = LazyZipOverHTTP(found["download_info"]["url"], pip.get_default_session(options), FETCH_BYTES)
            return str(found["metadata"]["version"]), zipfile.ZipFile(file)
        except Exception as error:  # pip's own kinds are private, too
            raise EnvironmentFault(f"no part of {requirement} can be read from the index: {error}") from error
