"""The file by which an engine's ranks find each other lies where the fleet removes it: vLLM leaves it in /tmp."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from polder.engines.vllm import plugin
from polder.engines.vllm.hooks import TAPS


def test_it_lies_with_the_engines_sockets_if_these_have_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.executor import multiproc_executor, uniproc_executor

    plugin.register()
    executors = (uniproc_executor, multiproc_executor)
    assert {tap.module for tap in TAPS if tap.function == "rendezvous"} == {module.__name__ for module in executors}
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    found = {module.get_file_store_init_method() for module in executors}
    assert len(found) == 2, "each engine has its own"
    assert all(place.startswith(f"file://{tmp_path}/vllm_dist_") for place in found)
    monkeypatch.delenv("VLLM_RPC_BASE_PATH")
    assert not uniproc_executor.get_file_store_init_method().startswith(f"file://{tmp_path}/")
