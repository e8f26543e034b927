"""Which KV blocks may stand for each other.

vLLM's block hash covers the tokens before and in the block, the LoRA's name, multimodal inputs and the request's cache_salt. It
does not cover what computed them nor how the bytes are laid out, so a tier that outlives one engine, or that two engines share,
needs a namespace: everything else that must be equal for bytes to be interchangeable. Its digest seeds every checksum, so that
bytes of another namespace are not merely unlikely to be asked for, they do not verify.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["Namespace", "config_digest", "cpu_isa", "weights_fingerprint"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OF_THE_FILE = ("transformers_version", "_name_or_path", "_commit_hash")


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Compared as a whole; any difference makes another namespace."""

    model: str
    weights: str
    """See `weights_fingerprint`; "unknown" where nothing tells them from others."""
    config: str
    """What the model is computed by beside its weights: see `config_digest`."""
    dtype: str
    """Of the KV cache, e.g. "bfloat16", "fp8_e4m3"."""
    layout: str
    """vLLM's KV cache layout and the sizes of its groups: block bytes, layers."""
    block_tokens: int
    isa: str
    """CPU attention packs KV for the instruction set it uses; "cuda" on GPUs."""
    shard: str
    """"rank/world" of the tensor-parallel shard."""
    software: str
    """What computed the bytes, e.g. "vllm 0.32.0": another release may lay out as many bytes otherwise, or round otherwise."""

    def digest(self) -> int:
        """64 bits that differ between namespaces."""
        text = repr(astuple(self))
        return xxhash.xxh3_64_intdigest(text.encode())


def weights_fingerprint(model: str, revision: str | None, cached: Path | None = None) -> str | None:
    """What changes when weights do. None when nothing says which they are.

    Of a folder or a file what it takes to replace them in place: names, sizes and times. Of a name on a hub the commit: a branch
    moves. `cached`: a file of that revision, `.../snapshots/<commit>/config.json`.
    """
    path = Path(model)
    if path.exists():
        files = [f for f in (sorted(path.iterdir()) if path.is_dir() else [path]) if f.suffix in _WEIGHTS]
        parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return xxhash.xxh3_64_hexdigest(repr(parts).encode()) if parts else None
    for commit in (cached.parent.name if cached else "", revision or ""):
        if _COMMIT.fullmatch(commit):
            return commit
    return None


def config_digest(config: Mapping[str, Any], **others: object) -> str:
    """Of a model's configuration as it is in force, overrides included, and of other settings that change what is computed.

    A context that is longer than the model was trained for is computed otherwise from the first token on where rope says so.
    """
    plain = {key: value for key, value in config.items() if key not in _OF_THE_FILE}
    text = json.dumps([plain, others], sort_keys=True, default=repr)
    return xxhash.xxh3_64_hexdigest(text.encode())


def cpu_isa() -> str:
    """The machine's architecture and the vector extensions that decide how attention packs its KV."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        return platform.machine()
    known = ("amx_bf16", "avx512f", "avx512_bf16", "avx2", "asimd", "bf16", "sve")
    return "-".join([platform.machine(), *(name for name in known if name in flags.split())])
