"""Packing puts every block on one page, and what is read together on the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.arrays import IntArray
from polder.bench.sparse.generator import Groups, latent_groups
from polder.errors import ConfigError, IntegrityError
from polder.swarm.activations import Profile
from polder.swarm.clusters import PackConfig, Packing, pack, pages_in_order, reading_order
from tests.conftest import examples
from tests.swarm.entries import pages_per_block

SIZE = 40
sets = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=20), max_size=30)


def profile_of(values: list[list[int]]) -> Profile:
    return Profile.of([np.unique(np.array(one, dtype=np.int64)) for one in values], size=SIZE)


@examples(60)
@given(sets, st.integers(1, 9), st.sampled_from([8, 16384]))
def test_every_block_is_on_one_page_and_only_the_last_page_is_not_full(
    values: list[list[int]], page_blocks: int, group_blocks: int
) -> None:
    packing = pack(profile_of(values), PackConfig(page_blocks=page_blocks, group_blocks=group_blocks))
    packing.check_integrity()
    assert sorted(packing.members[packing.members >= 0].tolist()) == list(range(SIZE))
    assert packing.pages == -(-SIZE // page_blocks)
    assert (packing.members[:-1] >= 0).all()


@examples(40)
@given(sets, st.lists(st.integers(0, SIZE - 1), unique=True))
def test_only_the_blocks_asked_for_are_packed(values: list[list[int]], blocks: list[int]) -> None:
    packing = pack(profile_of(values), PackConfig(page_blocks=4), blocks=np.array(blocks, dtype=np.int64))
    packing.check_integrity()
    assert set(np.flatnonzero(packing.page_of >= 0).tolist()) == set(blocks)


def test_conversations_get_pages_of_their_own() -> None:
    """Growing prefixes of four conversations, their blocks dealt in turn as a store would get them."""
    chats = [np.arange(chat, 64, 4) for chat in range(4)]
    order = np.random.default_rng(0).permutation(64)
    sets: list[IntArray] = [np.sort(chats[turn % 4][: 4 + turn]) for turn in order.tolist()]
    packing = pack(Profile.of(sets, size=64), PackConfig(page_blocks=4))
    assert all(len({block % 4 for block in page}) == 1 for page in packing.members.tolist())
    assert np.diff(np.sort(packing.members, axis=1), axis=1).max() == 4  # and neighbours in it stay together


@examples(40)
@given(sets)
def test_the_reading_order_has_every_page_once(values: list[list[int]]) -> None:
    assert sorted(reading_order(profile_of(values), neighbours=4).tolist()) == list(range(SIZE))


@pytest.mark.parametrize("group_blocks", [16384, 1024])
def test_packing_reads_fewer_pages_than_successive_blocks_do(group_blocks: int) -> None:
    """On other steps than those it was made from: 1.5 times fewer, where noise alone makes up more than half of them."""
    profile = latent_groups(Groups(blocks=4096, steps=300, seed=2))
    made, kept = profile.part(0, 250), profile.part(250, 300)
    config = PackConfig(page_blocks=16, group_blocks=group_blocks)
    in_order = Packing.of(pages_in_order(np.arange(4096), page_blocks=16), blocks=4096)
    packed = pack(made, config)
    assert pages_per_block(kept, packed) < pages_per_block(kept, in_order) / (1.25 if group_blocks < 4096 else 1.3)
    without_noise = latent_groups(Groups(blocks=4096, steps=300, seed=2, noise_share=0.0))
    packed = pack(without_noise.part(0, 250), config)
    kept = without_noise.part(250, 300)
    assert pages_per_block(kept, packed) < pages_per_block(kept, in_order) / 1.4


def test_what_was_never_read_is_packed_in_order() -> None:
    packing = pack(profile_of([]), PackConfig(page_blocks=5))
    assert np.array_equal(packing.members.reshape(-1), np.arange(SIZE))


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="write numbers above 0"):
        PackConfig(page_blocks=0)
    with pytest.raises(IntegrityError, match="2 places on pages for 1 blocks"):
        Packing.of(np.array([[3], [3]]), blocks=4).check_integrity()
