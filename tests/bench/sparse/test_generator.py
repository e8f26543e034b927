"""Synthetic access sets: seeded, and with the shares that their configuration says."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from polder.bench.sparse.generator import PESSIMISTIC, Groups, Sticky, latent_groups, resident, sticky_clusters
from polder.errors import ConfigError
from polder.swarm.activations import Profile


def test_the_same_seed_gives_the_same_sets_and_another_others() -> None:
    config = Groups(blocks=500, steps=20, seed=3)
    again, other = latent_groups(config), latent_groups(Groups(blocks=500, steps=20, seed=4))
    assert np.array_equal(latent_groups(config).items, again.items)
    assert not np.array_equal(again.items, other.items)


def test_groups_have_their_share_of_blocks_and_change_when_they_are_told_to() -> None:
    still = latent_groups(Groups(blocks=4000, steps=100, seed=1))
    assert np.diff(still.starts).mean() == pytest.approx(400, rel=0.25)
    drifting = latent_groups(Groups(blocks=4000, steps=100, seed=1, drift_step=50))
    assert np.array_equal(still.part(0, 50).items, drifting.part(0, 50).items)
    assert not np.array_equal(still.part(50, 100).items, drifting.part(50, 100).items)


def overlap(profile: Profile) -> float:
    sets = list(profile)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairwise(sets)]))


def test_sticky_sets_keep_what_they_should() -> None:
    config = Sticky(blocks=4000, steps=60, layers=8, window=64)
    layers = sticky_clusters(config)
    assert len(layers) == 8
    always = np.flatnonzero(resident(config))
    assert all(np.isin(always, one).all() for profile in layers for one in profile)
    assert 0.5 < overlap(layers[0]) < 0.98
    # Layers of one group choose alike, those of two groups hardly.
    like, unlike = (
        np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(layers[0], layers[other], strict=True)])
        for other in (1, 4)
    )
    assert like > unlike + 0.1
    (harsh,) = sticky_clusters(Sticky(blocks=4000, steps=60, window=64, keep_share=PESSIMISTIC.keep_share, zipf=0.8))
    assert overlap(harsh) < overlap(sticky_clusters(Sticky(blocks=4000, steps=60, window=64, keep_share=0.9))[0])


def test_a_share_above_1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise_share is 1\.5"):
        Groups(blocks=10, steps=1, noise_share=1.5)
