"""Access sets for `polder bench disks`: what each step reads from disks. Known steps come first, measured ones after
them in time.

Synthetic sets are those of polder.bench.sparse.generator. Conversations are real: a step is one turn, which reads those
blocks of its prompt that earlier turns have written, as if nothing of them were left in memory. All of it is of one
layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from polder.arrays import BoolArray, IntArray
from polder.bench.sparse.arms import Known
from polder.bench.sparse.generator import PESSIMISTIC, Groups, Sticky, latent_groups, resident, sticky_clusters
from polder.diskstore.model import PM9A3, DiskModel
from polder.errors import ConfigError
from polder.sim.traces import Trace, load_trace
from polder.swarm.activations import Profile

__all__ = [
    *("DESCRIPTIONS", "DISKS", "ENTRY_BYTES", "ENTRY_PAGE_BLOCKS", "PAGE_BYTES", "AccessSet", "SetSizes"),
    *("access_sets", "disks_of", "from_disks", "turn_reads"),
]

DISKS: dict[str, tuple[float, ...]] = {
    "1": (1.0,),
    "2": (1.0,) * 2,
    "4": (1.0,) * 4,
    "8": (1.0,) * 8,
    "4-slow": (0.5, *(1.0,) * 3),
    "8-slow": (0.5, *(1.0,) * 7),
}
"""The speed of each disk."""
PAGE_BYTES = 64 << 10
ENTRY_BYTES = 4 << 10
"""Keys and values of one token in one layer, of the models that Swarm was measured with."""
ENTRY_PAGE_BLOCKS = PAGE_BYTES // ENTRY_BYTES
RANDOM_BLOCKS, RANDOM_READS = 2048, 200
PAGE_TOKENS = 128
"""Tokens of a conversation on a page of 64 KiB: 512 B a token and layer, about what latent attention keeps in 8
bits."""
TRACES = {"mooncake": "mooncake-conversation", "weka": "weka-u32-clip300"}

DESCRIPTIONS = {
    "sticky": "small clusters that stay from step to step (generator.Sticky), entries of 4 KiB, 16 to a page",
    "sticky-64k": "the same, an eighth as many blocks, each of 64 KiB and a page of its own: nothing to pack",
    "groups": "latent groups among 15 % noise (generator.Groups), entries of 4 KiB, 16 to a page",
    "pessimistic": "as sticky, little kept and flat popularity (generator.PESSIMISTIC)",
    "random": f"{RANDOM_READS} of {RANDOM_BLOCKS} blocks of 64 KiB, drawn anew for every step: no co-activation",
    "mooncake": f"the last turns of an hour of Mooncake's conversations; {PAGE_TOKENS} tokens on a page of 64 KiB",
    "weka": f"the last turns of an hour of 32 users with WEKA's coding agents; {PAGE_TOKENS} tokens on a page of 64 KiB",
}


@dataclass(frozen=True, kw_only=True)
class SetSizes:
    seeds: tuple[int, ...]
    """Seeds of the synthetic sets: one instance each, their steps taken together. Conversations are what they are."""
    measured_steps: int
    """After those that the layouts know."""
    known_steps: int = 400
    """What clusters, placement and replicas are made from."""
    synthetic_blocks: int = 32768
    """Blocks of 4 KiB; `sticky-64k` has an eighth as many, of 64 KiB."""


class AccessSet(NamedTuple):
    """Two parts of one run over the same blocks; layouts are made from the first and measured on the second."""

    known: Known
    measured: Profile


def disks_of(name: str, model: DiskModel = PM9A3) -> list[DiskModel]:
    """ "4-slow" -> four disks, the first at half speed."""
    return [model if speed == 1 else model.slowed(speed) for speed in DISKS[name]]


def access_sets(name: str, sizes: SetSizes) -> list[AccessSet]:
    """One for each seed; conversations are one. Raises ConfigError when traces cannot be unpacked."""
    if name in TRACES:
        if find_spec("zstandard") is None:
            raise ConfigError("polder bench disks needs zstandard for its traces: install polder-kv[bench]")
        return [_conversations(load_trace(TRACES[name]), sizes)]
    return [_synthetic(name, sizes, seed) for seed in sizes.seeds]


def _synthetic(name: str, sizes: SetSizes, seed: int) -> AccessSet:
    blocks, steps = sizes.synthetic_blocks, sizes.known_steps + sizes.measured_steps
    if name == "random":
        rng = np.random.default_rng(seed)
        sets = [rng.choice(RANDOM_BLOCKS, RANDOM_READS, replace=False) for _ in range(steps)]
        return _parted(Profile.of(sets, size=RANDOM_BLOCKS), sizes, page_blocks=1)
    if name == "groups":
        return _parted(latent_groups(Groups(blocks=blocks, steps=steps, seed=seed)), sizes)
    if name == "sticky-64k":
        return _parted(from_disks(Sticky(blocks=blocks // 8, steps=steps, seed=seed, window=64)), sizes, page_blocks=1)
    config = PESSIMISTIC if name == "pessimistic" else Sticky(blocks=blocks, steps=steps)
    return _parted(from_disks(replace(config, blocks=blocks, steps=steps, seed=seed)), sizes)


def from_disks(*configs: Sticky) -> Profile:
    """Equal parts of each in turn, without what is always in memory."""
    profiles, steps = [sticky_clusters(config)[0] for config in configs], configs[0].steps // len(configs)
    parts = [profile.part(n * steps, (n + 1) * steps) for n, profile in enumerate(profiles)]
    whole = Profile.of([step for part in parts for step in part], size=configs[0].blocks)
    kept = np.where(resident(configs[0]), np.int64(-1), np.arange(whole.size))
    return whole.mapped(kept, size=whole.size)


def _conversations(trace: Trace, sizes: SetSizes) -> AccessSet:
    """The last turns that read anything. Blocks that none of them reads are left out: they would only lie there."""
    wanted = sizes.known_steps + sizes.measured_steps
    chosen = [blocks for blocks in turn_reads(trace) if len(blocks)][-wanted:]
    there = np.unique(np.concatenate(chosen))  # in order of first use, so that a prompt's blocks follow each other
    pages = trace.block_tokens // PAGE_TOKENS
    sets = [(np.searchsorted(there, blocks)[:, None] * pages + np.arange(pages)).reshape(-1) for blocks in chosen]
    return _parted(Profile.of(sets, size=len(there) * pages), sizes, page_blocks=1)


def turn_reads(trace: Trace) -> list[IntArray]:
    """For each request the leading blocks that earlier ones have written, but for those that all share: they stay in
    memory."""
    written: BoolArray = np.zeros(trace.unique_blocks, dtype=np.bool_)
    prompts = [trace.of(request) for request in range(trace.requests)]
    shared = np.bincount(np.concatenate([np.unique(blocks) for blocks in prompts])) == trace.requests
    reads: list[IntArray] = []
    for blocks in prompts:
        known = written[blocks]
        leading = blocks[: len(blocks) if known.all() else int(known.argmin())]
        reads.append(leading[~shared[leading]])
        written[blocks] = True
    return reads


def _parted(profile: Profile, sizes: SetSizes, *, page_blocks: int = ENTRY_PAGE_BLOCKS) -> AccessSet:
    known, measured = profile.part(0, sizes.known_steps), profile.part(sizes.known_steps, profile.steps)
    return AccessSet(Known(profile=known, page_blocks=page_blocks, block_bytes=PAGE_BYTES // page_blocks), measured)
