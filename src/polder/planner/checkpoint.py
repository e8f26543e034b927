"""How large a checkpoint's weights are when they are loaded, from the headers of its files; nothing of the weights is
read."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

__all__ = ["checkpoint_bytes", "hub_folder"]

_HEADER_MOST = 100 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")


def checkpoint_bytes(folder: Path, element_bytes: int) -> int | None:
    """Bytes of all weights, those that are not quantised at `element_bytes` as vLLM converts them. None when there is
    no file whose format is known."""
    try:
        files = _safetensors(folder)
        if files:
            return sum(_loaded_bytes(file, element_bytes) for file in files)
        return sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin")) or None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error):
        return None


def _safetensors(folder: Path) -> list[Path]:
    """Those that the index names: a folder may have the same weights in another order, too."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _loaded_bytes(file: Path, element_bytes: int) -> int:
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        if size > _HEADER_MOST:
            raise ValueError(f"{file}: no safetensors")
        header = json.loads(opened.read(size))
    total = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        first, last = tensor["data_offsets"]
        converted = tensor["dtype"] in _FLOATS
        total += math.prod(tensor["shape"]) * element_bytes if converted else last - first
    return total


def hub_folder(name: str) -> Path | None:
    """The folder of a model that this machine fetched from Hugging Face's hub before. None: it has none."""
    home = Path(os.environ.get("HF_HOME") or Path(os.path.expanduser("~")) / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    try:
        folder = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
        return folder if (folder / "config.json").is_file() else None
    except (OSError, ValueError):
        return None
