"""The website of the documentation is built, has every document, and none of its links leads nowhere."""

from __future__ import annotations

import subprocess
import sys

from scripts.build_docs import ROOT, listed


def test_the_website_is_built_and_no_link_leads_nowhere() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "build_docs.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [name.removesuffix(".md").removesuffix("README") for name in listed()]
    assert all((ROOT / "out" / "site" / folder / "index.html").exists() for folder in folders)


def test_the_website_has_every_document() -> None:
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} <= set(listed())
