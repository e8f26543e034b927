"""An aged layout is noticed and mended by rewriting some pages; DRAM keeps what saves most; predictions keep their budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polder.bench.sparse.generator import Groups, Sticky, latent_groups, sticky_clusters
from polder.errors import ConfigError
from polder.swarm.activations import Profile
from polder.swarm.adaptation import Drift, page_fill, pages_per_block, repack
from polder.swarm.clusters import PackConfig, pack
from polder.swarm.hotset import BenefitSet, HotSet, LruSet, benefit
from polder.swarm.placement import anti_affine
from polder.swarm.prediction import Predictor

SIZE = 24
sets = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=12), min_size=1, max_size=25)


def profile_of(values: list[list[int]]) -> Profile:
    return Profile.of([np.unique(np.array(one, dtype=np.int64)) for one in values], size=SIZE)


# ---------------------------------------------------------------- drift


def test_a_cost_a_quarter_above_that_after_clustering_is_drift_but_not_for_a_few_steps() -> None:
    drift = Drift(after_clustering=0.5, halflife_steps=10)

    def noticed(pages: int, steps: int) -> list[int]:
        found = []
        for step in range(steps):
            drift.note(pages, 100)
            if drift.drifted:
                found.append(step)
        return found

    assert noticed(60, 100) == []
    assert drift.ratio == pytest.approx(1.2)
    drift = Drift(after_clustering=0.5, halflife_steps=10)
    assert noticed(70, 40)[0] == 9
    with pytest.raises(ConfigError, match="write numbers above 0"):
        Drift(after_clustering=0.0)


def test_drift_is_noticed_and_mended_by_rewriting_some_pages() -> None:
    profile = latent_groups(Groups(blocks=4096, steps=700, seed=3, noise_share=0.02, drift_step=300, drift_share=0.3))
    before, after, later = profile.part(0, 300), profile.part(300, 600), profile.part(600, 700)
    config, speeds = PackConfig(page_blocks=4), np.ones(8)
    old = pack(before, config)
    pages = before.mapped(old.page_of, size=old.pages)
    disk_of = anti_affine(pages, speeds)
    drift = Drift(after_clustering=pages_per_block(before, old))
    for wanted in before:
        drift.note(len(np.unique(old.page_of[wanted])), len(wanted))
    assert not drift.drifted
    for wanted in after:
        drift.note(len(np.unique(old.page_of[wanted])), len(wanted))
    assert drift.drifted

    mended = repack(after, old, disk_of, speeds, fill_before=page_fill(before, old), config=config)
    mended.packing.check_integrity()
    aged, anew, repacked = (pages_per_block(later, one) for one in (old, pack(after, config), mended.packing))
    # Most of what packing everything anew would win, for part of the writes.
    assert anew < repacked < aged
    assert aged - repacked > 0.6 * (aged - anew)
    assert len(mended.moved) < 0.8 * old.pages


@settings(deadline=None, max_examples=60)
@given(sets, sets, st.integers(2, 5))
def test_only_moved_pages_change_and_no_block_is_lost(
    before: list[list[int]], after: list[list[int]], page_blocks: int
) -> None:
    then, now, config, speeds = profile_of(before), profile_of(after), PackConfig(page_blocks=page_blocks), np.ones(3)
    old = pack(then, config)
    disk_of = anti_affine(then.mapped(old.page_of, size=old.pages), speeds)
    new = repack(now, old, disk_of, speeds, fill_before=page_fill(then, old), config=config)
    new.packing.check_integrity()
    assert sorted(new.packing.members[new.packing.members >= 0].tolist()) == list(range(SIZE))
    stays = np.setdiff1d(np.arange(old.pages), new.moved)
    kept = stays[(new.packing.members[stays] >= 0).any(axis=1)]
    assert np.array_equal(new.packing.members[kept], old.members[kept])
    assert np.array_equal(new.disk_of[kept], disk_of[kept])


def test_a_layout_that_is_read_as_before_is_left_alone() -> None:
    profile = latent_groups(Groups(blocks=1000, steps=200, seed=4))
    config, speeds = PackConfig(page_blocks=4), np.ones(4)
    old = pack(profile, config)
    disk_of = anti_affine(profile.mapped(old.page_of, size=old.pages), speeds)
    # Pages worse than usual are tried again, and come out as they were or better.
    new = repack(profile, old, disk_of, speeds, fill_before=page_fill(profile, old), config=config)
    assert pages_per_block(profile, new.packing) <= 1.01 * pages_per_block(profile, old)


# ---------------------------------------------------------------- DRAM


@settings(deadline=None)
@given(sets, st.lists(st.integers(1, 9), min_size=SIZE, max_size=SIZE), st.integers(0, 60))
def test_a_hot_set_keeps_its_budget_and_answers_what_was_missing(
    values: list[list[int]], sizes: list[int], budget: int
) -> None:
    sizes_bytes = np.array(sizes)
    for hot in (BenefitSet(sizes_bytes, budget, latency_s=1e-4, bytes_per_s=1e9), LruSet(sizes_bytes, budget)):
        for read in profile_of(values):
            before = hot.resident.copy()
            assert hot.step(read).tolist() == [item for item in read.tolist() if not before[item]]
            hot.check_integrity()
            # Nothing comes in but what was just read.
            assert np.isin(np.flatnonzero(hot.resident & ~before), read).all()


def test_lru_keeps_the_newest() -> None:
    hot = LruSet(np.ones(5, dtype=np.int64), 2)
    for item in (0, 1, 2, 1, 3):
        hot.step(np.array([item]))
    assert np.flatnonzero(hot.resident).tolist() == [1, 3]


def test_benefit_prefers_the_small_the_often_read_and_saves_seconds() -> None:
    """Equation (6): as printed, size would not count but for f / s; here a read's own time does."""
    score = benefit(
        np.array([1.0, 2.0, 1.0]), np.array([1e5, 1e5, 1e6]), latency_s=1e-4, bytes_per_s=1e9
    )  # fmt: skip
    assert score == pytest.approx([2e-9, 4e-9, 1.1e-9])


def missed(hot: HotSet, profile: Profile) -> int:
    return sum(len(hot.step(read)) for read in profile)


def test_with_stable_popularity_benefit_misses_less_than_lru() -> None:
    rng = np.random.default_rng(0)
    weights = np.arange(1, 401) ** -0.9
    weights /= weights.sum()
    profile = Profile.of([rng.choice(400, 40, replace=False, p=weights) for _ in range(400)], size=400)
    sizes = np.full(400, 65536)
    ours = missed(BenefitSet(sizes, 60 * 65536, latency_s=8e-5, bytes_per_s=6.9e9, halflife_steps=64), profile)
    assert ours < missed(LruSet(sizes, 60 * 65536), profile)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_with_choices_that_stick_and_move_on_it_misses_no_more_than_lru(share: float) -> None:
    (profile,) = sticky_clusters(Sticky(blocks=2000, steps=200, sinks=0, window=0, seed=2))
    sizes, budget = np.full(2000, 65536), int(share * 2000) * 65536
    ours = missed(BenefitSet(sizes, budget, latency_s=8e-5, bytes_per_s=6.9e9), profile)
    assert ours <= 1.01 * missed(LruSet(sizes, budget), profile)
    with pytest.raises(ConfigError, match="half-life of 0 steps"):
        BenefitSet(sizes, budget, latency_s=8e-5, bytes_per_s=6.9e9, halflife_steps=0)


# ---------------------------------------------------------------- predictions


def following(profile: Profile) -> Predictor:
    """Predicts the next step from the one before it."""
    return Predictor(before=profile.part(0, max(0, profile.steps - 1)), after=profile.part(1, profile.steps))


@settings(deadline=None)
@given(sets, st.integers(0, 400), st.lists(st.booleans(), min_size=SIZE, max_size=SIZE))
def test_a_prediction_is_within_its_budget_and_nothing_resident(
    values: list[list[int]], budget: int, resident: list[bool]
) -> None:
    profile = profile_of(values)
    ahead = following(profile).ahead(
        profile.part(profile.steps - 1, profile.steps).items,
        budget_bytes=budget,
        item_bytes=20,
        resident=np.array(resident),
    )
    assert 20 * len(ahead) <= budget
    assert len(np.unique(ahead)) == len(ahead)
    assert not np.array(resident)[ahead].any()


def test_the_step_that_followed_the_same_set_is_predicted() -> None:
    profile = profile_of([[1, 2], [3], [4, 5], [1, 2], [6], [4, 5]])
    nobody = np.zeros(SIZE, dtype=np.bool_)
    predictor = following(profile)
    assert predictor.ahead(np.array([4, 5]), budget_bytes=100, item_bytes=10, resident=nobody).tolist() == [1, 2]
    assert set(predictor.ahead(np.array([1, 2]), budget_bytes=20, item_bytes=10, resident=nobody).tolist()) == {3, 6}
    # Nothing is like the present: nothing is read in vain.
    assert not len(predictor.ahead(np.array([9]), budget_bytes=100, item_bytes=10, resident=nobody))


def test_the_layer_above_is_predicted_better_than_by_popularity() -> None:
    layers = sticky_clusters(Sticky(blocks=2000, steps=240, layers=2, sinks=0, window=0, seed=1, zipf=0.8))
    lower, upper = (profile.part(0, 200) for profile in layers)
    predictor, nobody = Predictor(before=lower, after=upper), np.zeros(2000, dtype=np.bool_)
    popular = np.argsort(-upper.counts(), kind="stable")
    found, guessed = [], []
    for now, wanted in zip(layers[0].part(200, 240), layers[1].part(200, 240), strict=True):
        ahead = predictor.ahead(now, budget_bytes=len(wanted) * 64, item_bytes=64, resident=nobody)
        found.append(np.isin(ahead, wanted).sum() / len(wanted))
        guessed.append(np.isin(popular[: len(wanted)], wanted).sum() / len(wanted))
    assert np.mean(found) > np.mean(guessed) + 0.05


def test_profiles_that_do_not_match_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 steps followed by 1"):
        Predictor(before=profile_of([[1], [2]]), after=profile_of([[1]]))
