"""Bytes of two namespaces are never taken for each other."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from polder.tiers.namespace import Namespace, config_digest, cpu_isa, weights_fingerprint

BASE = Namespace(
    model="m",
    weights="w",
    config="c",
    dtype="bfloat16",
    layout="NHD:65536x4",
    block_tokens=16,
    isa="x86_64-avx2",
    shard="0/1",
    software="vllm 0.32.0",
)


@pytest.mark.parametrize("name", [field.name for field in fields(Namespace)])
def test_any_field_makes_another_digest(name: str) -> None:
    other = replace(BASE, **{name: 32 if name == "block_tokens" else getattr(BASE, name) + "x"})
    assert other.digest() != BASE.digest()


def test_the_digest_is_of_the_fields_alone_and_has_64_bits() -> None:
    assert replace(BASE).digest() == BASE.digest()
    assert 0 <= BASE.digest() < 1 << 64


def test_text_does_not_move_between_fields() -> None:
    assert replace(BASE, model="ab", weights="c").digest() != replace(BASE, model="a", weights="bc").digest()


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.00.pth", "pytorch_model.bin", "m.gguf"])
def test_weights_of_a_folder_are_known_by_their_files_whatever_revision_is_named(tmp_path: Path, name: str) -> None:
    assert weights_fingerprint(str(tmp_path), "main") is None
    file = tmp_path / name
    file.write_bytes(b"1234")
    for model in (tmp_path, file):
        before = weights_fingerprint(str(model), None)
        assert weights_fingerprint(str(model), "main") == before
        assert before is not None
        os.utime(file, ns=(0, hash(model) & 0xFFFF))  # replaced by others of the same size
        assert weights_fingerprint(str(model), None) != before


def test_weights_of_a_hub_are_known_by_a_commit_and_by_no_branch(tmp_path: Path) -> None:
    one, other = "1" * 40, "2" * 40
    cached = tmp_path / "models--org--model" / "snapshots" / one / "config.json"
    assert weights_fingerprint("org/model", "main") is None
    assert weights_fingerprint("org/model", None) is None
    assert weights_fingerprint("org/model", "main", cached) == one
    assert weights_fingerprint("org/model", other) == other


def test_whatever_changes_what_is_computed_changes_the_configs_digest() -> None:
    config = {"hidden_size": 64, "rope_parameters": {"rope_type": "default"}, "transformers_version": "5.0"}
    before = config_digest(config, quantization=None)
    assert config_digest(config | {"transformers_version": "5.1"}, quantization=None) == before
    assert config_digest(config | {"rope_parameters": {"rope_type": "yarn"}}, quantization=None) != before
    assert config_digest(config, quantization="fp8") != before


def test_the_instruction_set_is_the_same_on_every_call() -> None:
    assert cpu_isa() == cpu_isa() != ""
