"""The policy's rules, one test each, and what must hold for any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.broker.policy import Claim, EngineView, PolicyConfig, ample_pages, decide, missing_pages
from polder.errors import ConfigError

NO_RESERVE = PolicyConfig(reserve_low_ratio=0.0, reserve_high_ratio=0.0)


def view(name: str = "a", **values: object) -> EngineView:
    defaults: dict[str, object] = {"pages_per_unit": 1, "floor": 1, "share": 50, "ceiling": 100, "held": 1}
    return EngineView(name=name, **{**defaults, **values})  # type: ignore[arg-type]


def test_free_memory_goes_to_waiting_requests() -> None:
    plan = decide(100, 98, [view(busy=1, waiting=30), view("b")], NO_RESERVE)
    assert plan.grants["a"] == 30
    assert "b" not in plan.grants
    assert not plan.recalls


def test_an_owner_gets_its_share_back_from_a_borrower_with_running_requests() -> None:
    borrower, owner = view(held=80, busy=80, peak=80), view("b", held=20, busy=20, waiting=30)
    plan = decide(100, 0, [borrower, owner], NO_RESERVE)
    assert plan.targets["b"].units == 50
    assert plan.recalls["a"].units == 30
    assert plan.recalls["a"].preempt, "running requests of the borrower must make room"


def test_an_engine_within_its_share_is_never_recalled_for_another_beyond_its_own() -> None:
    plan = decide(100, 0, [view(held=50, busy=50), view("b", held=50, busy=50, waiting=40)], NO_RESERVE)
    assert not plan.recalls


def test_idle_cache_is_recalled_without_preempting() -> None:
    plan = decide(100, 0, [view(held=80, busy=10, cached=80), view("b", held=20, busy=20, waiting=5)], NO_RESERVE)
    assert plan.recalls["a"].units == 5
    assert not plan.recalls["a"].preempt


def test_memory_nobody_else_wants_stays_where_it_is() -> None:
    plan = decide(100, 0, [view(held=80, busy=1, cached=10), view("b", held=20, busy=1)], NO_RESERVE)
    assert not plan.recalls
    assert not plan.grants


def test_cache_goes_where_it_saves_most_across_a_cliff() -> None:
    cliff = [0.0] * 40 + [9.0] * 61  # worth nothing below 40 units, everything from there on
    slope = [0.01 * i for i in range(101)]
    plan = decide(100, 98, [view(curve=cliff), view("b", curve=slope)], NO_RESERVE)
    assert plan.targets["a"].units >= 40
    assert plan.targets["a"].units + plan.targets["b"].units <= 100


def test_cache_is_not_taken_before_the_hold_time() -> None:
    engines = [view(held=60, cached=60, since_grow_s=0.1), view("b", held=40, curve=[0.1 * i for i in range(101)])]
    assert not decide(100, 0, engines, NO_RESERVE).recalls
    engines[0] = view(held=60, cached=60, since_grow_s=5.0)
    assert decide(100, 0, engines, NO_RESERVE).recalls["a"].units > 0


def test_the_reserve_is_refilled_below_the_low_watermark_only() -> None:
    config = PolicyConfig(reserve_low_ratio=0.05, reserve_high_ratio=0.1)
    idle_rich = view(held=94, cached=94, curve=[0.01 * i for i in range(101)])
    assert not decide(100, 6, [idle_rich], config).recalls
    full = view(held=97, cached=97, curve=[0.01 * i for i in range(101)])
    assert decide(100, 3, [full], config).recalls["a"].units == 7


def test_cache_never_eats_the_reserve_but_requests_may() -> None:
    config = PolicyConfig(reserve_low_ratio=0.05, reserve_high_ratio=0.1)
    assert decide(100, 10, [view(held=90, cached=90, curve=[float(i) for i in range(101)])], config).grants == {}
    assert decide(100, 10, [view(held=90, busy=90, waiting=8)], config).grants == {"a": 8}


def test_a_pinned_engine_gets_exactly_its_pin() -> None:
    assert decide(100, 50, [view(held=50, busy=1, pinned=70)], NO_RESERVE).grants == {"a": 20}
    recall = decide(100, 50, [view(held=50, busy=40, pinned=10)], NO_RESERVE).recalls["a"]
    assert recall.units == 40
    assert recall.preempt


def test_recalled_memory_is_not_recalled_twice() -> None:
    engines = [view(held=80, recalled=30, busy=80), view("b", held=20, busy=20, waiting=30)]
    assert decide(100, 0, engines, NO_RESERVE).recalls == {}


def test_memory_that_comes_by_itself_is_not_recalled() -> None:
    engines = [view(held=80, busy=10, cached=80), view("b", held=10, busy=10, waiting=10)]
    assert decide(90, 0, engines, NO_RESERVE).recalls["a"].units == 10
    assert decide(100, 0, engines, NO_RESERVE, coming_pages=10).recalls == {}


def test_only_what_no_recall_of_cache_can_bring_is_missing() -> None:
    cache, needy = view(held=60, cached=60, busy=10), view("b", held=40, busy=40, waiting=50)
    assert missing_pages(100, [cache, needy]) == 0
    assert missing_pages(95, [cache, needy]) == 5


def test_needs_of_the_last_seconds_and_useful_cache_are_not_ample() -> None:
    curve = [min(units, 30) * 0.1 for units in range(101)]
    engines = [view(held=60, curve=curve), view("b", held=40, busy=5, peak=20), view("c", pages_per_unit=2, pinned=4)]
    assert ample_pages(100, engines) == 100 - 30 - 20 - 8


def test_an_urgent_claim_comes_before_requests_and_takes_what_comes_free() -> None:
    claim = Claim(engine="w", pages=30, urgent=True)
    plan = decide(100, 10, [view(held=90, busy=90, waiting=20, share=90)], NO_RESERVE, claims=[claim])
    assert plan.claimed == {"w": 10}
    assert plan.grants == {}
    assert plan.recalls["a"] == (20, True)


def test_a_claim_that_is_not_urgent_comes_before_caches_in_whole_steps_and_preempts_nobody() -> None:
    claim = Claim(engine="w", pages=40, step_pages=8, urgent=False)
    cache = view(held=90, busy=50, cached=90, curve=[float(units) for units in range(101)])
    plan = decide(100, 10, [cache], NO_RESERVE, claims=[claim])
    assert plan.claimed == {"w": 8}
    assert plan.recalls["a"] == (30, False)
    assert decide(100, 10, [view(held=90, busy=90, share=90)], NO_RESERVE, claims=[claim]).recalls == {}
    assert decide(100, 10, [cache], PolicyConfig(), claims=[claim]).claimed == {"w": 0}, "the reserve is not used"


@pytest.mark.parametrize("bad", [{"reserve_low_ratio": 0.4, "reserve_high_ratio": 0.1}, {"deadline_s": 0.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PolicyConfig(**bad)


@st.composite
def some_claims(draw: st.DrawFn) -> list[Claim]:
    claims = []
    for name in draw(st.sampled_from(["", "x", "xy"])):
        step = draw(st.integers(1, 9))
        pages = step * draw(st.integers(0, 12))
        claims.append(Claim(engine=name, pages=pages, step_pages=step, urgent=draw(st.booleans())))
    return claims


@st.composite
def devices(draw: st.DrawFn) -> tuple[int, int, list[EngineView]]:
    count = draw(st.integers(1, 4))
    engines = []
    for number in range(count):
        floor = draw(st.integers(1, 5))
        ceiling = draw(st.integers(floor, 60))
        held = draw(st.integers(floor, ceiling))
        gains = draw(st.lists(st.floats(0, 1), max_size=ceiling))
        curve = [sum(gains[:i]) for i in range(len(gains) + 1)]
        engines.append(
            EngineView(
                name=str(number),
                pages_per_unit=draw(st.integers(1, 4)),
                floor=floor,
                share=draw(st.integers(floor, ceiling)),
                ceiling=ceiling,
                held=held,
                recalled=draw(st.integers(0, held)),
                busy=draw(st.integers(0, held)),
                waiting=draw(st.integers(0, 80)),
                peak=draw(st.integers(0, 80)),
                cached=draw(st.integers(0, held)),
                curve=curve,
                since_grow_s=draw(st.sampled_from([0.0, 10.0])),
                since_shrink_s=draw(st.sampled_from([0.0, 10.0])),
            )
        )
    used = sum(e.held * e.pages_per_unit for e in engines)
    free = draw(st.integers(0, 50))
    return used + free, free, engines


@given(devices(), some_claims())
def test_any_plan_can_be_carried_out(device: tuple[int, int, list[EngineView]], claims: list[Claim]) -> None:
    total, free, engines = device
    config = PolicyConfig()
    plan = decide(total, free, engines, config, claims=claims)
    by_name = {e.name: e for e in engines}
    claimed = sum(plan.claimed.values())
    assert sum(t.units * by_name[n].pages_per_unit for n, t in plan.targets.items()) <= total
    assert claimed + sum(u * by_name[n].pages_per_unit for n, u in plan.grants.items()) <= free
    for claim in claims:
        assert 0 <= plan.claimed[claim.engine] <= claim.pages
        assert plan.claimed[claim.engine] % claim.step_pages == 0
    floors_fit = not any(claim.urgent for claim in claims)
    for name, target in plan.targets.items():
        assert (by_name[name].floor if floors_fit else 0) <= target.units <= by_name[name].ceiling
    for name, units in plan.grants.items():
        assert 0 < units <= by_name[name].ceiling - by_name[name].held
    for name, recall in plan.recalls.items():
        assert by_name[name].kept - recall.units >= (by_name[name].floor if floors_fit else 0)
        assert recall.preempt == (by_name[name].kept - recall.units < by_name[name].busy)
    assert not set(plan.grants) & set(plan.recalls)


@given(devices())
def test_every_owner_may_have_its_share_for_its_requests(device: tuple[int, int, list[EngineView]]) -> None:
    total, free, engines = device
    if sum(e.share * e.pages_per_unit for e in engines) > total:
        return
    plan = decide(total, free, engines, PolicyConfig())
    for engine in engines:
        assert plan.targets[engine.name].units >= min(engine.need, engine.share)
