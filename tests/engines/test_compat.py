"""Only a vLLM that was tested is patched; a stock engine is left alone whatever the version."""

from __future__ import annotations

import pytest

from polder.engines.vllm import compat
from polder.errors import UnsupportedVersion


def test_an_unknown_version_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedVersion, match=r"vLLM 0\.99\.0 is installed.*0\.32\.0.*unset POLDER_BROKER"):
        compat.check_version("0.99.0")


def test_the_installed_vllm_has_every_seam() -> None:
    pytest.importorskip("vllm")
    compat.check_version(compat.installed_version())
    compat.check_seams()


def test_a_changed_private_function_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    block_pool = pytest.importorskip("vllm.v1.core.block_pool")
    monkeypatch.setattr(block_pool.BlockPool, "move_block_hashes", lambda self, src: None)
    with pytest.raises(UnsupportedVersion, match="move_block_hashes"):
        compat.check_seams()
