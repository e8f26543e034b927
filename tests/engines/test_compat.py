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


@pytest.mark.parametrize(
    ("module", "name", "function"),
    [
        ("vllm.v1.core.block_pool", "BlockPool", "move_block_hashes"),
        ("vllm.v1.core.sched.scheduler", "Scheduler", "_free_request_blocks"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_model_forward"),
    ],
)
def test_a_changed_private_function_is_noticed(
    module: str, name: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = getattr(pytest.importorskip(module), name)
    monkeypatch.setattr(owner, function, lambda self, src: None)
    with pytest.raises(UnsupportedVersion, match=function):
        compat.check_seams()
