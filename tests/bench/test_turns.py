"""What `polder bench turns` is made of: bytes of the arms, fleet files, orders, workloads, checks, the tables."""

from __future__ import annotations

import json
import tomllib
from html import escape
from pathlib import Path
from typing import Any

import pytest

from polder.bench.harness.driver import measured_turns
from polder.bench.harness.engines import EnginePlan, fleet_toml
from polder.bench.report.result import Arms, BenchResult, ratios_over
from polder.bench.turns_checks import turns_checks
from polder.bench.turns_conditions import describe_links, describe_turns
from polder.bench.turns_equality import rounds_of_questions
from polder.bench.turns_plan import (
    ARMS,
    EQUALITY_BYTES,
    FULL_TURNS,
    LOAD_BYTES,
    QUICK_TURNS,
    STAGES,
    compared,
    engines_of,
    links_text,
    parse_names,
)
from polder.bench.turns_report import render_turns_html
from polder.bench.turns_setup import BATCHED_TOKENS
from polder.bench.workloads.agents import agents, chats, unique_prompts, unmeasured
from polder.bench.workloads.models import MODEL_A, MODEL_B
from polder.emulation.options import parse_links
from polder.errors import ConfigError

MIB = 1 << 20


def base() -> list[EnginePlan]:
    return [
        EnginePlan(
            name=name,
            recipe=recipe,
            model_path=Path("/models") / name,
            max_model_len=1024,
            core=core,
            share_bytes=128 * MIB,
            batched_tokens=BATCHED_TOKENS,
        )
        for core, (name, recipe) in enumerate((("A", MODEL_A), ("B", MODEL_B)))
    ]


def fleet(arm: str, links: Any = "emulated") -> dict[str, Any]:
    return tomllib.loads(fleet_toml(engines_of(arm, base(), LOAD_BYTES, links), 8123))


def native(links: Any = "emulated") -> dict[str, Any]:
    a, _ = engines_of("native", base(), LOAD_BYTES, links)
    arguments = a.arguments()
    return json.loads(arguments[arguments.index("--kv-transfer-config") + 1])  # type: ignore[no-any-return]


def test_sizes_are_those_of_the_reference_workload() -> None:
    per_token = MODEL_A.kv_bytes_per_token
    assert LOAD_BYTES.pool_a // per_token == 16_384
    assert LOAD_BYTES.host // per_token == 32_768
    assert LOAD_BYTES.lend_b // per_token == 12_288
    assert LOAD_BYTES.lend_b < LOAD_BYTES.pool_b


def test_the_native_arm_has_the_bytes_of_both_tiers_behind_the_host_link() -> None:
    config = native()
    extra = config["kv_connector_extra_config"]
    assert extra["cpu_bytes_to_use"] == 352 * MIB
    assert extra["link_bytes_per_s"] == parse_links(links_text())["host"] == 400e6
    assert extra["offload_prompt_only"] is False
    assert (config["kv_connector"], config["kv_load_failure_policy"]) == ("OffloadingConnector", "recompute")
    assert "link_bytes_per_s" not in native(links="none")["kv_connector_extra_config"]


@pytest.mark.parametrize(
    ("arm", "host", "tiers", "lend"),
    [
        ("polder", 256 * MIB, ["peer", "host"], 96 * MIB),
        ("polder-host", 256 * MIB, ["host"], None),
        ("polder-peer", None, ["peer"], 96 * MIB),
    ],
)
def test_polder_arms_have_their_tiers_and_sizes_that_do_not_move(
    arm: str, host: int | None, tiers: list[str], lend: int | None
) -> None:
    found = fleet(arm)
    a, b = found["model"]
    assert found["memory"]["kv_budget"] == f"{256 * MIB}B"
    assert found["memory"].get("host") == a.get("host") == (f"{host}B" if host else None)
    assert a["tiers"] == tiers
    assert b.get("lend") == (f"{lend}B" if lend else None)
    assert "tiers" not in b, "the lender stores nowhere"
    assert "lend" not in a
    for model in (a, b):
        assert model["floor"] == model["share"] == model["ceiling"] == f"{128 * MIB}B"
    assert a["env"]["POLDER_LINKS"] == "peer=3.2GB/s,host=400MB/s"
    assert "POLDER_LINKS" not in fleet(arm, links="none")["model"][0]["env"]


def test_the_elastic_bench_has_no_tiers_and_sizes_that_move() -> None:
    found = tomllib.loads(fleet_toml(base(), 8123))
    assert "host" not in found["memory"]
    assert all(not {"tiers", "host", "lend", "floor", "ceiling"} & model.keys() for model in found["model"])


def test_arms_differ_in_nothing_but_what_stands_behind_the_pool() -> None:
    stock = engines_of("stock", base(), LOAD_BYTES, "emulated")
    for arm in ARMS:
        for engine, plain in zip(engines_of(arm, base(), LOAD_BYTES, "emulated"), stock, strict=True):
            assert engine.blocks == plain.blocks
            assert [a for a in engine.arguments() if a not in engine.extra_args] == list(plain.arguments())
            assert engine.environment().items() >= plain.environment().items()
    assert "--max-num-batched-tokens" in stock[0].arguments()
    assert "1024" in stock[0].arguments()


def test_orders_are_symmetric_in_time_where_arms_are_repeated() -> None:
    assert FULL_TURNS.agents_order == (*ARMS, *reversed(ARMS))
    assert FULL_TURNS.chat_order == tuple(reversed(FULL_TURNS.chat_order))
    assert QUICK_TURNS.agents_order[1:] == ("polder", "native", "native", "polder")


def test_only_some_arms_and_stages() -> None:
    plan = FULL_TURNS.only(stages=["equality", "agents"], arms=["native", "stock"])
    assert plan.stages == ("agents", "equality")
    assert plan.agents_order == ("stock", "native", "native", "stock")
    assert plan.equality_arms == ("stock", "native")
    assert QUICK_TURNS.only(arms=["polder-peer", "stock"]).agents_order == ("stock", "polder-peer")
    assert FULL_TURNS.only() == FULL_TURNS


def test_arms_are_set_against_every_baseline_that_was_run() -> None:
    assert compared(["stock-chat", "native-chat", "polder-chat"], "-chat") == [
        ("native-chat", "stock-chat"),
        ("polder-chat", "stock-chat"),
        ("polder-chat", "native-chat"),
    ]
    assert compared(["stock", "polder-lender"], "") == []
    assert len(compared(ARMS, "")) == 9


def test_load_beside_the_lender_is_the_agents_and_counts_nowhere() -> None:
    load = agents(model="A", users=16, sessions=48)
    beside = unmeasured(load)
    assert measured_turns(beside) == 0
    assert measured_turns(load) == 768
    assert [t.key for t in beside.users[2]] == [t.key for t in load.users[2]]
    assert beside.stagger_s == load.stagger_s


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    assert parse_names(" agents, chat ,", STAGES, what="stage") == ["agents", "chat"]
    with pytest.raises(ConfigError, match=r"unknown arm 'polder-disk'; known are stock, native"):
        parse_names("polder-disk", ARMS, what="arm")


def test_unique_prompts_share_no_block_and_fit_the_engine() -> None:
    for at_a_time in (1, 4):
        blocks = unique_prompts(model="A", requests=40, scale=2, blocks=4, at_a_time=at_a_time)
        assert [len(block.users) for block in blocks] == [at_a_time] * 4
        turns = [turn for block in blocks for user in block.users for turn in user]
        prompts = [json.loads(turn.body)["prompt"] for turn in turns]
        assert len({turn.key for turn in turns}) == 40
        assert len({tuple(prompt[:32]) for prompt in prompts}) == 40
        assert max(len(prompt) for prompt in prompts) < 4000


def test_chats_come_at_their_times_and_fit_the_engine() -> None:
    turns = chats(model="A").turns
    assert len(turns) == 227
    assert turns[-1].at_s == pytest.approx(119.553)
    assert all(len(json.loads(turn.body)["prompt"]) + turn.output_tokens <= 4224 for turn in turns)


def test_equality_asks_for_more_than_the_pool_holds_and_each_tier_holds_it() -> None:
    rounds = rounds_of_questions(seed=0)
    of_a = [prompt for _, prompt in rounds[0]["A"]]
    per_token = MODEL_A.in_float32().kv_bytes_per_token
    blocks = {tuple(prompt[: end + 32]) for prompt in of_a for end in range(0, len(prompt) - 31, 32)}
    assert 32 * len(blocks) > 2 * EQUALITY_BYTES.pool_a // per_token
    assert 32 * len(blocks) + 96 * len(of_a) < min(EQUALITY_BYTES.host, EQUALITY_BYTES.lend_b) // per_token
    assert rounds[1]["A"] == rounds[0]["A"]
    of_b = sum(len(prompt) + 96 for _, prompt in rounds[1]["B"])
    left_to_b = EQUALITY_BYTES.pool_b - EQUALITY_BYTES.lend_b
    assert of_b * MODEL_B.in_float32().kv_bytes_per_token > left_to_b, "B needs what it lent"


def arms(**polder: float) -> Arms:
    def engine(p99: float, tbt: float = 50.0) -> dict[str, Any]:
        return {"ttft_p99_ms": p99, "tbt_p99_ms": tbt, "hit_ratio": 0.5, "failed_requests": 0.0}

    return {
        "stock": {"A": engine(1000.0), "B": engine(100.0)},
        "native": {"A": engine(400.0), "B": engine(100.0)},
        "polder": {"A": engine(polder.get("a", 300.0)), "B": engine(polder.get("b", 104.0), polder.get("tbt", 52.0))},
    }


def ratios_of(found: Arms) -> dict[str, float]:
    pairs = [("polder", "stock"), ("polder", "native"), ("polder-lender", "stock-lender")]
    return {k: v for arm, base in pairs if arm in found for k, v in ratios_over(found, arm=arm, baseline=base).items()}


@pytest.mark.parametrize(
    ("polder", "missed"),
    [
        ({}, set()),
        ({"a": 311.0}, {"a_ttft_p99_ratio_to_stock_at_most_0_31"}),
        ({"a": 401.0}, {"a_ttft_p99_ratio_to_stock_at_most_0_31", "a_ttft_p99_ratio_to_native_at_most_1_00"}),
        ({"b": 106.0}, {"b_ttft_p99_ratio_at_most_1_05"}),
        ({"tbt": 53.0}, {"b_tbt_p99_ratio_at_most_1_05"}),
    ],
)
def test_checks_of_the_agents_runs(polder: dict[str, float], missed: set[str]) -> None:
    found = arms(**polder)
    checks = turns_checks(found, ratios_of(found), {"polder/stock:A.ttft_p99_ms": (0.2, 0.4)})
    assert {check.name for check in checks if not check.passed} == missed
    assert len(checks) == 5, "what was not run is not claimed"


def test_the_lender_is_judged_by_its_own_stage_where_that_was_run() -> None:
    found = arms(b=200.0)
    found["stock-lender"] = {"B": {"ttft_p99_ms": 100.0, "tbt_p99_ms": 50.0}}
    found["polder-lender"] = {"B": {"ttft_p99_ms": 101.0, "tbt_p99_ms": 50.0}}
    checks = {check.name: check for check in turns_checks(found, ratios_of(found), {})}
    assert checks["b_ttft_p99_ratio_at_most_1_05"].passed
    assert "polder-lender/stock-lender" in checks["b_ttft_p99_ratio_at_most_1_05"].detail


@pytest.mark.parametrize(
    ("ttft", "speed", "within"),
    [((0.99, 1.009), (0.995, 1.0), True), ((0.99, 1.02), (0.995, 1.0), False), ((0.99, 1.0), (0.98, 1.0), False)],
)
def test_the_tax_counts_the_whole_interval(ttft: tuple[float, float], speed: tuple[float, float], within: bool) -> None:
    key = "polder-noreuse-4/stock-noreuse-4:A."
    intervals = {f"{key}ttft_p50_ms": ttft, f"{key}busy_output_tokens_per_s": speed}
    checks = {check.name: check.passed for check in turns_checks(arms(), {}, intervals)}
    assert checks["noreuse_tax_within_1_percent_4_at_a_time"] is within
    assert "noreuse_tax_within_1_percent_1_at_a_time" not in checks


@pytest.mark.parametrize(
    ("change", "passed"), [({}, True), ({"answers_different": 1.0}, False), ({"tier_hit_tokens": 0.0}, False)]
)
def test_equal_tokens_that_no_tier_served_show_nothing(change: dict[str, float], passed: bool) -> None:
    counts: dict[str, Any] = {"answers_compared": 66.0, "answers_different": 0.0, "tier_hit_tokens": 900.0}
    found: Arms = {"polder-host-equality": {"all": counts | change}}
    checks = {check.name: check.passed for check in turns_checks(found, {}, {})}
    assert checks["tokens_equal_polder_host"] is passed


def test_failed_requests_of_any_arm_are_missed() -> None:
    found = arms()
    found["native"]["B"]["failed_requests"] = 1.0
    assert not {check.name: check.passed for check in turns_checks(found, {}, {})}["no_failed_requests"]


@pytest.mark.parametrize("links", ["emulated", "none"])
def test_the_result_and_its_page_say_what_the_links_were(links: Any) -> None:
    from dataclasses import replace

    plan = replace(FULL_TURNS, links=links)
    found, ratios = arms(), ratios_of(arms())
    conditions = describe_turns(plan, base())
    assert conditions["links"].startswith("links emulated: " if links == "emulated" else "links not emulated")
    checks = turns_checks(found, ratios, {})
    result = BenchResult(
        bench="turns", conditions=conditions, arms=found, ratios=ratios, checks={c.name: c.passed for c in checks}
    )
    page = render_turns_html(result, checks)
    assert escape(describe_links(plan)) in page
    assert "A: agents" in page
    assert "$" not in page
