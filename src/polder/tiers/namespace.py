"""Which KV blocks may stand for each other.

vLLM's block hash covers the tokens before and in the block, the LoRA's name, multimodal inputs and the request's cache_salt. It
does not cover what computed them nor how the bytes are laid out, so a tier that outlives one engine, or that two engines share,
needs a namespace: everything else that must be equal for bytes to be interchangeable. Its digest seeds every checksum, so that
bytes of another namespace are not merely unlikely to be asked for, they do not verify.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import xxhash

__all__ = ["Namespace", "cpu_isa", "weights_fingerprint"]


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Compared as a whole; any difference makes another namespace."""

    model: str
    weights: str
    """Revision or fingerprint of the weights, see `weights_fingerprint`."""
    dtype: str
    """Of the KV cache, e.g. "bfloat16", "fp8_e4m3"."""
    layout: str
    """vLLM's KV cache layout and the sizes of its groups: block bytes, layers."""
    block_tokens: int
    isa: str
    """CPU attention packs KV for the instruction set it uses; "cuda" on GPUs."""
    shard: str
    """"rank/world" of the tensor-parallel shard."""

    def digest(self) -> int:
        """64 bits that differ between namespaces."""
        text = repr(astuple(self))
        return xxhash.xxh3_64_intdigest(text.encode())


def weights_fingerprint(folder: Path, revision: str | None) -> str:
    """The revision if there is one, else what changes when weights are replaced in place: names, sizes and times of the files."""
    if revision:
        return revision
    files: Iterable[Path] = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return xxhash.xxh3_64_hexdigest(repr(parts).encode()) if parts else "unknown"


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
