"""Models are made once, and always the same."""

from __future__ import annotations

import json
import warnings
from hashlib import sha256
from pathlib import Path

import pytest

from polder.bench.workloads.models import ModelRecipe, ensure_model

pytest.importorskip("transformers")
pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def quiet_libraries() -> None:
    warnings.simplefilter("ignore")  # torch and transformers warn about themselves on import


def recipe(**more: object) -> ModelRecipe:
    fields = {"name": "m", "family": "llama", "layers": 1, "hidden": 32, "intermediate": 32, "heads": 2, "kv_heads": 1}
    return ModelRecipe(**(fields | {"head_dim": 16, "vocab": 100, "max_positions": 64} | more))  # type: ignore[arg-type]


def digest(folder: Path) -> str:
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_recipe_always_gives_the_same_bytes(tmp_path: Path, family: str) -> None:
    one = ensure_model(recipe(family=family), tmp_path / "one")
    two = ensure_model(recipe(family=family), tmp_path / "two")
    assert digest(one) == digest(two)
    assert digest(one) != digest(ensure_model(recipe(family=family, seed=5), tmp_path / "one"))
    assert json.loads((one / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    folder = ensure_model(recipe(), tmp_path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_model(recipe(), tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_an_unfinished_model_is_made_again(tmp_path: Path) -> None:
    folder = ensure_model(recipe(), tmp_path)
    (folder / "recipe.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert digest(ensure_model(recipe(), tmp_path)) != sha256(b"half").hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, ".lock"}, "no draft is left"


def test_a_word_is_a_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ensure_model(recipe(), tmp_path))
    assert tokenizer("t5 t77 t99").input_ids == [5, 77, 99]
    assert tokenizer.decode([5, 77, 99]) == "t5 t77 t99"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "t7 t8"}], tokenize=False)
    assert chat.split() == ["t7", "t8"]
