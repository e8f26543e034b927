"""Bytes of two namespaces are never taken for each other."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from polder.tiers.namespace import Namespace, cpu_isa, weights_fingerprint

BASE = Namespace(
    model="m", weights="w", dtype="bfloat16", layout="NHD:65536x4", block_tokens=16, isa="x86_64-avx2", shard="0/1"
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


def test_weights_are_known_by_revision_or_else_by_their_files(tmp_path: Path) -> None:
    assert weights_fingerprint(tmp_path, "abc") == "abc"
    assert weights_fingerprint(tmp_path, None) == "unknown"
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1234")
    before = weights_fingerprint(tmp_path, None)
    assert weights_fingerprint(tmp_path, None) == before != "unknown"
    os.utime(file, ns=(0, 0))  # replaced by others of the same size
    assert weights_fingerprint(tmp_path, None) != before


def test_the_instruction_set_is_the_same_on_every_call() -> None:
    assert cpu_isa() == cpu_isa() != ""
