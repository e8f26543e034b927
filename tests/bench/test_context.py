"""`polder bench context`: the same bytes in all arms, lengths that end at each arm's longest, checks that can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from polder.bench.context_checks import context_checks
from polder.bench.context_plan import (
    ARMS,
    FULL_CONTEXT,
    LINK_BYTES_PER_S,
    QUICK_CONTEXT,
    ContextPlan,
    context_engine,
    window_layers_of,
)
from polder.bench.context_predict import planned_tbt_ms, planned_ttft_ms
from polder.bench.context_report import render_context_html
from polder.bench.harness.engines import BLOCK_TOKENS, fleet_toml
from polder.bench.report.result import Arms, BenchResult, ratios_over
from polder.planner.context_cost import Stream

STREAM = Stream(link_bytes_per_s=LINK_BYTES_PER_S, window_layers=2)
PLANS = [QUICK_CONTEXT, FULL_CONTEXT]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_window_of_two_layers_holds_nine_tenths_of_layers_over_two_times_stocks(plan: ContextPlan) -> None:
    ratio = plan.longest("window") / plan.longest("stock")
    assert ratio >= 0.9 * plan.recipe.layers / 2
    assert plan.longest("enough") >= plan.longest("window")
    assert plan.longest("window-4") < plan.longest("window-3") < plan.longest("window")


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "enough"])
def test_lengths_grow_to_the_arms_longest_and_pass_stocks(plan: ContextPlan, arm: str) -> None:
    lengths = plan.lengths(arm)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == plan.longest(arm)
    assert plan.longest("stock") in lengths
    assert set(lengths) <= {n for a in ARMS for n in plan.lengths(a)}


def test_blocks_beyond_the_regular_ones_are_windowed() -> None:
    plan = QUICK_CONTEXT
    assert plan.windowed_blocks(2, plan.longest("stock") // 2) == 0
    found = [plan.windowed_blocks(2, tokens) for tokens in range(32, plan.longest("window"), 32)]
    assert found == sorted(found)
    regular = plan.unit_blocks - 1
    assert found[-1] >= plan.longest("window") // BLOCK_TOKENS - regular - 2


def test_every_arm_but_enough_has_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polder.bench.context_plan.ensure_model", lambda recipe, folder: folder)
    engines = {arm: context_engine(arm, QUICK_CONTEXT, Path("models")) for arm in QUICK_CONTEXT.arms}
    assert {e.share_bytes for arm, e in engines.items() if arm != "enough"} == {QUICK_CONTEXT.local_bytes}
    assert engines["enough"].blocks * BLOCK_TOKENS > QUICK_CONTEXT.longest("enough")
    text = fleet_toml([engines["window-4"]], 1)
    assert "window_layers = 4" in text
    assert f'host = "{engines["window-4"].window_bytes}B"' in text
    assert f'page = "{QUICK_CONTEXT.page_bytes}B"' in text
    assert [window_layers_of(arm) for arm in ("stock", "window", "window-4-link")] == [None, 2, 4]


def arms(**over: float) -> Arms:
    base = {"refused_beyond": 1.0, "answers_compared": 3.0, "answers_different": 0.0, "tbt_100_ms": 20.0}
    link = {"tbt_100_ms": 50.0, "planned_tbt_100_ms": 48.0, "windowed_100_blocks": 9.0}
    return {
        "enough": {"all": base | {"answers_compared": 0.0}},
        "stock": {"all": base | {"context_tokens": 1000.0, "ttft_stocks_longest_ms": 100.0}},
        "window": {"all": base | {"context_tokens": 7700.0, "ttft_stocks_longest_ms": 105.0}},
        "window-link": {"all": base | link | over},
    }


def checks_of(found: Arms) -> dict[str, bool]:
    ratios = ratios_over(found, arm="window", baseline="stock")
    return {check.name: check.passed for check in context_checks(found, ratios, QUICK_CONTEXT)}


def test_checks_pass_and_each_can_fail() -> None:
    assert all(checks_of(arms()).values())
    assert len(checks_of(arms())) == 6
    for name, over in {
        "decode_within_20_percent_of_the_plan": {"planned_tbt_100_ms": 39.0},
        "tokens_equal": {"answers_different": 1.0},
        "longer_contexts_are_refused": {"refused_beyond": 0.0},
    }.items():
        assert [check for check, passed in checks_of(arms(**over)).items() if not passed] == [name]
    short = arms()
    short["window"]["all"] |= {"context_tokens": 3900.0, "ttft_stocks_longest_ms": 111.0}
    assert sum(not passed for passed in checks_of(short).values()) == 3


def test_the_page_shows_lengths_and_checks() -> None:
    found = arms()
    for of in found.values():
        of["all"]["ttft_100_ms"] = 10.0
    ratios = ratios_over(found, arm="window", baseline="stock")
    checks = context_checks(found, ratios, QUICK_CONTEXT)
    result = BenchResult(
        bench="context", conditions={}, arms=found, ratios=ratios, checks={c.name: c.passed for c in checks}
    )
    page = render_context_html(result, checks)
    assert "<svg" in page
    assert "tokens_equal" in page
    assert "window-link" in page


def test_the_plan_adds_nothing_where_nothing_is_windowed_and_the_links_time_where_it_is_the_bound() -> None:
    plan = QUICK_CONTEXT
    short, long = plan.longest("stock") // 2, plan.longest("window")
    assert planned_tbt_ms(plan, STREAM, short, 14.0) == pytest.approx(14.0)
    link_ms = (
        plan.windowed_blocks(2, long - 32) * BLOCK_TOKENS * plan.recipe.kv_bytes_per_token / LINK_BYTES_PER_S * 1e3
    )
    assert planned_tbt_ms(plan, STREAM, long, 14.0) == pytest.approx(link_ms, rel=0.1)
    ttfts = {n: 0.6 * (n - 64) + 1e-4 * (n - 64) ** 2 for n in (short, 2 * short, long)}
    assert planned_ttft_ms(plan, STREAM, short, ttfts) == pytest.approx(ttfts[short])
    planned = planned_ttft_ms(plan, STREAM, long, ttfts)
    assert ttfts[long] <= planned <= ttfts[long] + link_ms * -(-long // plan.batched_tokens)
