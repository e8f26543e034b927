"""Synthetic access sets: which blocks each step of sparse decoding reads. The same configuration gives the same sets.

There are two kinds, because no recorded sets are public. `latent_groups`: blocks belong to hidden groups of different
sizes, whose members are read together four times out of five, among noise; groups can change during the run.
`sticky_clusters`: small clusters, half of them contiguous, that are kept from one step to the next with some
probability until the topic changes; layers make similar choices. PESSIMISTIC is a configuration of the second kind that
keeps little and has a flat popularity. Report it beside any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray
from polder.errors import ConfigError
from polder.swarm.activations import Profile

__all__ = ["PESSIMISTIC", "Groups", "Sticky", "latent_groups", "resident", "sticky_clusters"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Configuration of `latent_groups`. Raises ConfigError for a share outside [0, 1]."""

    blocks: int
    steps: int
    seed: int = 0
    active_share: float = 0.10
    """Share of all blocks that one step reads."""
    blocks_per_group: int = 82
    second_share: float = 0.3
    """Share of blocks that are in a second group too."""
    fire_share: float = 0.8
    """Share of a group's members that are read when the group is."""
    noise_share: float = 0.15
    """Share of a step's blocks that are drawn evenly from all blocks."""
    keep_share: float = 0.7
    """Share of a step's groups that the next step reads, too."""
    zipf: float = 1.0
    drift_step: int | None = None
    """The step before which groups change; None: never."""
    drift_share: float = 0.2
    """Share of blocks that move to other groups then; also, a fifth of the groups change their popularity."""

    def __post_init__(self) -> None:
        for name in ("active_share", "second_share", "fire_share", "noise_share", "keep_share", "drift_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"groups: {name} is {getattr(self, name)}; write a number from 0 to 1")


def latent_groups(config: Groups) -> Profile:
    rng = np.random.default_rng(config.seed)
    groups = max(20, config.blocks // config.blocks_per_group)
    sizes = rng.lognormal(0, 0.6, groups)
    sizes /= sizes.sum()
    members = _members(config, sizes, rng)
    popularity = rng.permutation(_zipf(groups, config.zipf))
    wanted = round(config.active_share * config.blocks)
    noise = round(config.noise_share * wanted)
    mean = float(np.average([len(ids) for ids in members], weights=popularity))
    at_once = min(groups, max(1, round((wanted - noise) / (config.fire_share * mean))))
    chosen = np.zeros(groups, dtype=np.bool_)
    sets: list[IntArray] = []
    for step in range(config.steps):
        if step == config.drift_step:
            members = _drifted(members, config, sizes, rng)
            changed = rng.choice(groups, groups // 5, replace=False)
            popularity[changed] = rng.permutation(popularity[changed])
        chosen = _next_choice(chosen, config.keep_share, at_once, popularity, rng)
        read = [ids[rng.random(len(ids)) < config.fire_share] for ids in (members[g] for g in np.flatnonzero(chosen))]
        sets.append(np.unique(np.concatenate([*read, rng.choice(config.blocks, noise, replace=False)])))
    return Profile.of(sets, size=config.blocks)


@dataclass(frozen=True, kw_only=True)
class Sticky:
    """Configuration of `sticky_clusters`."""

    blocks: int
    steps: int
    seed: int = 0
    layers: int = 1
    active_share: float = 0.10
    keep_share: float = 0.75
    """Share of a step's clusters that the next step reads, too; with several layers, the mean over them."""
    zipf: float = 1.0
    cluster_blocks: tuple[int, int] = (8, 16)
    second_share: float = 0.15
    """Share of blocks that are in a second cluster too."""
    sinks: int = 4
    """The number of first blocks, which every step reads."""
    window: int = 256
    """The number of last blocks, which every step reads."""
    topic_steps: tuple[int, int] = (32, 128)
    """Range of a topic's length. When the topic changes, `jump_keep_share` of the clusters are kept."""
    jump_keep_share: float = 0.2
    layer_group: int = 4
    """Number of successive layers that share much of their choice."""
    layer_share: tuple[float, float] = (0.7, 1.0)


PESSIMISTIC = Sticky(blocks=32768, steps=520, keep_share=0.6, zipf=0.8)
"""Take another size by dataclasses.replace."""


def resident(config: Sticky) -> BoolArray:
    """[blocks] sinks and window, which every step reads, so they would not be put on a disk."""
    ids = np.arange(config.blocks)
    return (ids < config.sinks) | (ids >= config.blocks - config.window)


def sticky_clusters(config: Sticky) -> list[Profile]:
    """One profile for each layer. All layers have the same clusters and choose among them."""
    rng = np.random.default_rng(config.seed)
    always = np.flatnonzero(resident(config))
    members = _clusters(config, rng)
    popularity = rng.permutation(_zipf(len(members), config.zipf))
    wanted = config.active_share * config.blocks
    mean = float(np.average([len(ids) for ids in members], weights=popularity))
    at_once = min(len(members), max(1, round(wanted / mean)))
    # A beta distribution with mean keep_share: as was observed, some layers are very sticky and others hardly.
    keep = np.full(1, config.keep_share)
    if config.layers > 1:
        keep = rng.beta(8 * config.keep_share, 8 * (1 - config.keep_share), config.layers)
    jumps = _jumps(config, rng)
    chosen = np.zeros((config.layers, len(members)), dtype=np.bool_)
    sets: list[list[IntArray]] = [[] for _ in range(config.layers)]
    for step in range(config.steps):
        for layer in range(config.layers):
            leader = layer - layer % config.layer_group
            if layer == leader:
                share = config.jump_keep_share if jumps[step] else float(keep[layer])
            else:
                share = rng.uniform(*config.layer_share)
            chosen[layer] = _next_choice(chosen[leader], share, at_once, popularity, rng)
            read = [members[cluster] for cluster in np.flatnonzero(chosen[layer])]
            sets[layer].append(np.unique(np.concatenate([always, *read])))
    return [Profile.of(of_layer, size=config.blocks) for of_layer in sets]


def _zipf(count: int, exponent: float) -> FloatArray:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / float(weights.sum())


def _next_choice(
    chosen: BoolArray, keep_share: float, count: int, popularity: FloatArray, rng: np.random.Generator
) -> BoolArray:
    """Keeps each of `chosen` with probability `keep_share`, and fills up to `count` by popularity."""
    kept = chosen & (rng.random(len(chosen)) < keep_share)
    missing = count - int(kept.sum())
    if missing > 0:
        weights = np.where(kept, 0.0, popularity)
        kept[rng.choice(len(chosen), missing, replace=False, p=weights / weights.sum())] = True
    return kept


def _members(config: Groups, sizes: FloatArray, rng: np.random.Generator) -> list[IntArray]:
    """Blocks in spans of one group each: passages of 4 to 32 blocks among single ones; some blocks in a second
    group."""
    owner = np.empty(config.blocks, dtype=np.int64)
    at = 0
    while at < config.blocks:
        length = int(rng.integers(4, 33)) if rng.random() < 8 / 37 else 1
        owner[at : at + length] = rng.choice(len(sizes), p=sizes)
        at += length
    second = rng.choice(config.blocks, int(config.second_share * config.blocks), replace=False)
    ids = np.concatenate([np.arange(config.blocks), second])
    return _grouped(ids, np.concatenate([owner, rng.choice(len(sizes), len(second), p=sizes)]), len(sizes))


def _grouped(ids: IntArray, group: IntArray, groups: int) -> list[IntArray]:
    order = np.lexsort((ids, group))
    return [np.unique(part) for part in np.split(ids[order], np.searchsorted(group[order], np.arange(1, groups)))]


def _drifted(members: list[IntArray], config: Groups, sizes: FloatArray, rng: np.random.Generator) -> list[IntArray]:
    moved = rng.choice(config.blocks, int(config.drift_share * config.blocks), replace=False)
    gone = np.zeros(config.blocks, dtype=np.bool_)
    gone[moved] = True
    new = _grouped(moved, rng.choice(len(sizes), len(moved), p=sizes), len(sizes))
    return [np.union1d(ids[~gone[ids]], more) for ids, more in zip(members, new, strict=True)]


def _clusters(config: Sticky, rng: np.random.Generator) -> list[IntArray]:
    """Every block between sinks and window in one cluster, contiguous or scattered, and some in two."""
    low, high = config.cluster_blocks
    ids = np.flatnonzero(~resident(config))
    cuts = np.cumsum(rng.integers(low, high + 1, len(ids) // low + 1))
    spans = np.split(ids, cuts[cuts < len(ids)])
    scattered = rng.random(len(spans)) < 0.5
    loose = rng.permutation(
        np.concatenate([span for span, loose in zip(spans, scattered, strict=True) if loose] or [ids[:0]])
    )
    taken, members = 0, []
    for span, is_scattered in zip(spans, scattered, strict=True):
        if is_scattered:
            span = np.sort(loose[taken : taken + len(span)])
            taken += len(span)
        members.append(span)
    second = rng.choice(ids, int(config.second_share * len(ids)), replace=False)
    more = _grouped(second, rng.integers(0, len(members), len(second)), len(members))
    return [np.union1d(own, joined) for own, joined in zip(members, more, strict=True)]


def _jumps(config: Sticky, rng: np.random.Generator) -> BoolArray:
    low, high = config.topic_steps
    at = np.cumsum(rng.integers(low, high + 1, config.steps // low + 1))
    return np.isin(np.arange(config.steps), at)
