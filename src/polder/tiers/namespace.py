"""The namespace of KV blocks: everything besides the block hash that must be equal for two blocks to be
interchangeable.

vLLM's block hash covers the tokens before and in the block, the LoRA's name, multimodal inputs and the request's
cache_salt. It does not cover the model that computed the block, nor the layout of its bytes. A tier that outlives an
engine, or that engines share, needs that too. The namespace's digest seeds every checksum, so bytes of another
namespace do not verify.
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
    """Any difference makes another namespace."""

    model: str
    weights: str
    """See `weights_fingerprint`; "unknown" where nothing identifies them."""
    config: str
    """See `config_digest`."""
    dtype: str
    """The type of the KV cache, e.g. "bfloat16" or "fp8_e4m3"."""
    layout: str
    """vLLM's KV cache layout, and the block bytes and layers of its groups."""
    block_tokens: int
    isa: str
    """The CPU's instruction set, for which CPU attention packs KV; "cuda" on GPUs."""
    shard: str
    """"rank/world" of the tensor-parallel shard."""
    software: str
    """The software that computed the bytes, e.g. "vllm 0.32.0". Another release may lay out or round them differently.
    """

    def digest(self) -> int:
        """A 64-bit hash of all fields."""
        text = repr(astuple(self))
        return xxhash.xxh3_64_intdigest(text.encode())


def weights_fingerprint(model: str, revision: str | None, cached: Path | None = None) -> str | None:
    """A text that changes when the weights change; None when nothing identifies them.

    For a folder or a file it covers names, sizes and modification times. For a name on a hub it is the commit, because
    a branch moves. `cached`: a file of that revision, `.../snapshots/<commit>/config.json`.
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
    """A hash of the model's effective configuration, with overrides, and of other settings that change what is
    computed.

    For example, RoPE scaling for longer contexts changes the computation from the first token on.
    """
    plain = {key: value for key, value in config.items() if key not in _OF_THE_FILE}
    text = json.dumps([plain, others], sort_keys=True, default=repr)
    return xxhash.xxh3_64_hexdigest(text.encode())


def cpu_isa() -> str:
    """The machine's architecture, with the vector extensions that decide how CPU attention packs KV."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        return platform.machine()
    known = ("amx_bf16", "avx512f", "avx512_bf16", "avx2", "asimd", "bf16", "sve")
    return "-".join([platform.machine(), *(name for name in known if name in flags.split())])
