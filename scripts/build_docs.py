"""Builds the website of the documentation in out/site, and fails when a link leads nowhere: python scripts/build_docs.py

Needs the extra `docs`. Look at it with `python -m http.server -d out/site`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")


def listed() -> list[str]:
    """The pages that the website's navigation names."""
    found: list[str] = []

    def read(entry: Any) -> None:
        if isinstance(entry, str):
            found.append(entry)
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                read(inner)

    read(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    return found


def linked(path: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    targets = (target for target, _ in LINK.findall(path.read_text()) if target and "://" not in target)
    return {(path.parent / target).resolve() for target in targets}


def main() -> int:
    pages = ROOT / "out" / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    files = {ROOT / name for name in listed()}
    # In the repository's tree, so that links hold there and here. What is linked and no page comes along as it is.
    for path in files | {target for page in files for target in linked(page)}:
        copy = pages / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
