"""Documents name what exists: sections, tests and files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
