"""Documents name what exists, and the prose of the code can be read at once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from scripts.build_docs import LINK, listed

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "polder"
READ = (
    *(
        "broker",
        "cli",
        "demo",
        "emulation",
        "memory",
        "planner",
        "serve",
        "sim",
        "stream",
        "swarm",
        "weights",
        "window",
        ".",
    ),
    *(f"engines/vllm/{room}" for room in ("", "core", "rank", "start", "weights", "window")),
)
"""Packages whose prose was read for these rules; the others follow."""


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_each_row_of_what_can_fail_has_its_details_and_its_tests() -> None:
    text = (ROOT / "docs" / "failures.md").read_text()
    sections = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    rows = re.findall(r"^\| \[[^]]*\]\(#([^)]*)\)", text, re.MULTILINE)
    details = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert rows == [anchor(heading) for heading in details]
    assert set(rows) <= sections
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in sources, name
    for name in set(re.findall(r"`(tests/[\w/.]+)`", text)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", listed())
def test_each_link_leads_to_a_file_and_a_heading(page: str) -> None:
    path = ROOT / page
    for target, section in LINK.findall(path.read_text()):
        if "://" not in target:
            found = (path.parent / target).resolve() if target else path
            assert found.is_relative_to(ROOT), target
            assert found.exists(), target
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if section else ()
            assert not section or section in map(anchor, headings), f"{target}#{section}"


@pytest.mark.parametrize("package", READ)
def test_prose_begins_with_its_subject_and_fits_its_lines(package: str) -> None:
    for path in (SOURCES / package).glob("*.py"):
        source = path.read_text()
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
        texts = [
            node.value for node in nodes if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        for text in texts:
            assert not text.value.lstrip().startswith("Of "), f"{path.name}:{text.lineno}"
            lines = source.splitlines()[text.lineno - 1 : text.end_lineno]
            assert max(map(len, lines)) <= 120, f"{path.name}:{text.lineno}: prose in docstrings is wrapped at 120"
