"""Only a vLLM that was tested is patched; a stock engine is left alone whatever the version."""

from __future__ import annotations

import pytest

from polder.engines.vllm import compat
from polder.errors import UnsupportedVersion


def test_an_unknown_version_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedVersion, match=r"vLLM 0\.99\.0 is installed.*0\.32\.0.*unset POLDER_BROKER"):
        compat.check_version("0.99.0")


def test_a_release_has_the_common_seams_but_for_its_own_and_earlier_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "TESTED", {"1.0": "", "1.1": "", "1.2": ""})
    monkeypatch.setattr(compat, "SEAMS", (("m", "f", ("a",)), ("m", "g", ("a",))))
    later = compat.Change(since="1.1", name="f", parameters=("a", "b"), reason="")
    last = compat.Change(since="1.2", name="f", parameters=("b",), reason="")
    monkeypatch.setattr(compat, "CHANGES", (later, last))
    assert compat.seams_of("1.0") == compat.SEAMS
    assert compat.seams_of("1.1") == (("m", "f", ("a", "b")), ("m", "g", ("a",)))
    assert compat.seams_of("1.2") == (("m", "f", ("b",)), ("m", "g", ("a",)))
    assert compat.seams_of("1.3") == compat.seams_of("1.2"), "an unknown release is compared with the newest tested one"


def test_every_change_is_of_one_seam_in_a_tested_release() -> None:
    names = [dotted for _, dotted, _ in compat.SEAMS]
    for change in compat.CHANGES:
        assert names.count(change.name) == 1
        assert change.since in compat.TESTED
        assert change.reason
    since = [list(compat.TESTED).index(change.since) for change in compat.CHANGES]
    assert since == sorted(since)
    assert len({(module, dotted) for module, dotted, _ in compat.SEAMS}) == len(compat.SEAMS)


def test_the_installed_vllm_has_every_seam() -> None:
    pytest.importorskip("vllm")
    compat.check_version(compat.installed_version())
    compat.check_seams()


def test_the_seams_look_the_same_after_polder_has_patched_them() -> None:
    pytest.importorskip("vllm")
    from polder.engines.vllm import plugin

    plugin.register()
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
