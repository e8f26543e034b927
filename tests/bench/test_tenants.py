"""What `polder bench tenants` is made of: bytes of the arms, fleet files, legs, workloads."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from polder.bench.harness.driver import OpenLoop, measured_turns
from polder.bench.harness.engines import EnginePlan, fleet_toml
from polder.bench.stages.equality import OUTPUT_TOKENS
from polder.bench.tenants_equality import EQUALITY_MAX_MODEL_LEN, ROUNDS, questions_of
from polder.bench.tenants_plan import (
    BUDGET_BYTES,
    EQUALITY_ENGINES,
    FULL_TENANTS,
    KV_SHARE_BYTES,
    QUICK_TENANTS,
    engines_of,
)
from polder.bench.workloads.tenants import MAX_MODEL_LEN, TURNS, conversations_begun, spatial, temporal, warm_up
from polder.bench.workloads.tenants_models import TENANTS, VOCAB, layer_bytes, weights_bytes
from polder.bench.workloads.traces import load_tenants
from polder.broker.wire import Resize, Sleep
from polder.cli.main import app
from polder.memory.page import PAGE_BYTES
from polder.serve.fleet import load_fleet

WEIGHTS = {name: weights_bytes(recipe) for name, recipe in TENANTS.items()}


def base() -> list[EnginePlan]:
    return [
        EnginePlan(
            name=name,
            recipe=recipe,
            model_path=Path("/models") / name,
            max_model_len=MAX_MODEL_LEN,
            core=0,
            more_cores=(1,),
            share_bytes=KV_SHARE_BYTES,
            weights_bytes=WEIGHTS[name],
        )
        for name, recipe in TENANTS.items()
    ]


def fleet(arm: str) -> dict[str, Any]:
    return tomllib.loads(fleet_toml(engines_of(arm, base()), 8123))


# ---------------------------------------------------------------- models and bytes


@pytest.mark.parametrize("name", TENANTS)
def test_a_layers_bytes_are_those_of_the_model_that_is_built(name: str) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    recipe = TENANTS[name]
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config, model = classes[recipe.family]
    with torch.device("meta"):
        built = model(
            config(
                num_hidden_layers=1,
                hidden_size=recipe.hidden,
                intermediate_size=recipe.intermediate,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.kv_heads,
                head_dim=recipe.head_dim,
                vocab_size=8,
            )
        )
    assert layer_bytes(recipe) == 2 * sum(p.numel() for p in built.model.layers[0].parameters())
    assert layer_bytes(recipe.in_float32()) == 2 * layer_bytes(recipe)


@pytest.mark.parametrize("name", TENANTS)
def test_models_are_deep_and_their_layers_fill_their_pages(name: str) -> None:
    recipe = TENANTS[name]
    assert recipe.layers >= 12
    assert 140 << 20 < WEIGHTS[name] < 300 << 20
    assert 0.98 < recipe.layers * layer_bytes(recipe) / WEIGHTS[name] < 1


def test_all_arms_have_the_same_bytes_and_weights_are_over_half_of_them() -> None:
    kv = fleet("kv-only")["memory"]["kv_budget"]
    assert kv == f"{3 * KV_SHARE_BYTES}B"
    assert fleet("polder")["memory"]["budget"] == f"{BUDGET_BYTES}B"
    assert sum(WEIGHTS.values()) + 3 * KV_SHARE_BYTES == BUDGET_BYTES
    assert sum(engine.blocks * 32 * engine.recipe.kv_bytes_per_token for engine in base()) == 3 * KV_SHARE_BYTES
    assert sum(WEIGHTS.values()) / BUDGET_BYTES > 0.5
    padding = sum(WEIGHTS[name] - r.layers * layer_bytes(r) for name, r in TENANTS.items())
    assert padding // 3 < PAGE_BYTES, "what stock's weights need less would not be a page of KV for each model"


def test_only_polders_weights_are_elastic_and_all_engines_compute_on_one_core() -> None:
    assert [model.get("weights") for model in fleet("kv-only")["model"]] == [None] * 3
    assert [model["weights"] for model in fleet("polder")["model"]] == ["elastic"] * 3
    assert "budget" not in fleet("kv-only")["memory"]
    assert {model["cpus"] for model in fleet("polder")["model"]} == {"0,1"}
    assert {m["env"]["VLLM_CPU_OMP_THREADS_BIND"] for arm in ("kv-only", "polder") for m in fleet(arm)["model"]} == {
        "0"
    }
    assert {m["env"]["POLDER_WAKE"] for m in fleet("polder-whole")["model"]} == {"whole"}
    assert {m["env"]["POLDER_WAKE"] for m in fleet("polder-streamed")["model"]} == {"streamed"}
    assert {m["env"]["POLDER_TBT_GOAL"] for m in fleet("polder")["model"]} == {"400ms"}
    assert engines_of("stock", base()) == base()
    assert {engine.batched_tokens for engine in engines_of("stock-short", base())} == {256}


@pytest.mark.parametrize(("arm", "budget"), [("kv-only", 3 * KV_SHARE_BYTES), ("polder", BUDGET_BYTES)])
def test_the_fleet_file_is_one_that_polder_serve_reads(arm: str, budget: int, tmp_path: Path) -> None:
    placed = []
    for engine in base():
        folder, r = tmp_path / engine.name, engine.recipe
        folder.mkdir()
        heads = {"num_attention_heads": r.heads, "num_key_value_heads": r.kv_heads, "head_dim": r.head_dim}
        sizes = {"hidden_size": r.hidden, "intermediate_size": r.intermediate, "vocab_size": r.vocab}
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": r.layers, **heads, **sizes}))
        placed.append(replace(engine, model_path=folder))
    path = tmp_path / "fleet.toml"
    path.write_text(fleet_toml(engines_of(arm, placed), 8123))
    read = load_fleet(path)
    assert read.budget_bytes == budget
    assert [model.settings.kv_share_bytes for model in read.models] == [KV_SHARE_BYTES] * 3
    assert all(model.least_bytes and model.least_bytes <= KV_SHARE_BYTES for model in read.models)


def test_the_longest_request_fits_a_share_with_room_and_a_busy_models_share_does_not_fit_the_load() -> None:
    tokens = {engine.name: engine.blocks * 32 for engine in base()}
    assert all(share > MAX_MODEL_LEN for share in tokens.values())
    reclaimed = BUDGET_BYTES - WEIGHTS["T1"]
    assert reclaimed // TENANTS["T1"].kv_bytes_per_token > 6 * tokens["T1"]


# ---------------------------------------------------------------- plan


def test_legs_are_symmetric_in_time_and_take_as_long_as_was_asked() -> None:
    assert tuple(reversed(FULL_TENANTS.order)) == FULL_TENANTS.order
    assert tuple(reversed(QUICK_TENANTS.order)) == QUICK_TENANTS.order
    rates = [leg.rates for leg in QUICK_TENANTS.legs]
    assert rates == [(0.5, 4.0), (4.0, 0.5), (0.5, 4.0), (4.0, 0.5)]
    assert QUICK_TENANTS.expected_s < 25 * 60
    assert FULL_TENANTS.expected_s < 90 * 60


def test_only_some_arms_and_stages() -> None:
    plan = FULL_TENANTS.only(stages=["spatial", "comeback"], arms=["polder", "stock"])
    assert plan.stages == ("spatial", "comeback")
    assert plan.order == ("stock", "polder", "polder", "stock")
    assert all(leg.rates == () for leg in plan.legs)
    assert QUICK_TENANTS.only(arms=["kv-only", "stock"]).order == ("stock", "stock", "kv-only")
    assert FULL_TENANTS.only() == FULL_TENANTS
    assert FULL_TENANTS.only(stages=["equality"]).expected_s < 180


def test_flags_of_the_command() -> None:
    command = typer.main.get_command(app).commands["bench"].commands["tenants"]  # type: ignore[attr-defined]
    flags = {parameter.opts[0] for parameter in command.params}
    assert flags == {"--json", "--html", "--quick", "--stages", "--arms", "--workdir"}


# ---------------------------------------------------------------- workload


def test_the_trace_gives_each_model_its_turns() -> None:
    slots = load_tenants()
    assert len(slots) == 57
    assert "".join(slot.tenant[1] for slot in slots)[3:15] == "112233113221"
    assert Counter(slot.tenant for slot in slots).keys() == TENANTS.keys()
    for slot in slots:
        assert len(slot.starts) == 16
        assert all(0 <= s.at < 1 and 512 <= s.input_tokens <= 1408 and 8 <= s.output_tokens <= 48 for s in slot.starts)


def prompts_of(load: OpenLoop) -> dict[str, list[int]]:
    return {turn.key: json.loads(turn.body)["prompt"] for turn in load.turns}


def test_the_same_seed_gives_the_same_requests_and_another_other_prompts_at_the_same_times() -> None:
    slots = FULL_TENANTS.slots
    once, again = (temporal(slots=slots, rate=1.0, seed=0) for _ in range(2))
    assert once == again
    other = temporal(slots=slots, rate=1.0, seed=1)
    assert {t.key for t in other["T1"].turns} == {t.key for t in once["T1"].turns}
    assert prompts_of(other["T1"])["4.0.0"][:32] != prompts_of(once["T1"])["4.0.0"][:32]


def test_a_rate_multiplies_conversations_in_the_same_time() -> None:
    counts = [
        sum(measured_turns(load) for load in temporal(slots=FULL_TENANTS.slots, rate=rate, seed=0).values())
        for rate in FULL_TENANTS.rates
    ]
    assert counts == sorted(counts)
    assert counts[3] / counts[1] == pytest.approx(4, rel=0.1)
    slot = load_tenants()[3]
    assert conversations_begun(slot, 100) == list(slot.starts), "no more than the trace has"


def test_contexts_grow_share_their_past_and_fit_the_engine() -> None:
    for model, load in temporal(slots=FULL_TENANTS.slots, rate=3.0, seed=0).items():
        prompts, outputs = prompts_of(load), {turn.key: turn.output_tokens for turn in load.turns}
        assert [turn.at_s for turn in load.turns] == sorted(turn.at_s for turn in load.turns)
        assert all(len(prompt) + outputs[key] <= MAX_MODEL_LEN for key, prompt in prompts.items())
        assert max(map(max, prompts.values())) < VOCAB
        assert len({tuple(p[:32]) for key, p in prompts.items() if key.endswith(".0")}) * TURNS == len(prompts)
        for key, prompt in prompts.items():
            conversation, turn = key.rsplit(".", 1)
            if turn != "0":
                before = prompts[f"{conversation}.{int(turn) - 1}"]
                assert prompt[: len(before)] == before
                assert len(prompt) > len(before)
        assert {json.loads(turn.body)["model"] for turn in load.turns} == {model}


def test_models_take_turns_in_time() -> None:
    loads = temporal(slots=range(3, 9), rate=1.0, seed=0)
    begun = {name: [turn.at_s for turn in load.turns if turn.key.endswith(".0")] for name, load in loads.items()}
    assert max(begun["T1"]) < 18 <= min(begun["T2"])
    assert max(begun["T2"]) < 36 <= min(begun["T3"])


def test_two_models_are_always_in_use_in_the_spatial_stage() -> None:
    loads = spatial(users=8, seed=0)
    assert loads.keys() == {"T1", "T2"}
    assert [len(load.users) for load in loads.values()] == [8, 8]
    bodies = [turn.body for load in loads.values() for user in load.users for turn in user]
    assert len(set(bodies)) == len(bodies) == 256
    assert measured_turns(warm_up("T3", seed=0)) == 5


def test_equality_asks_for_more_than_a_share_and_every_prompt_fits() -> None:
    asked = questions_of(EQUALITY_ENGINES, 0)
    for engine, prompts in asked.items():
        assert max(len(p) + OUTPUT_TOKENS for _, p in prompts) <= EQUALITY_MAX_MODEL_LEN
        assert max(max(p) for _, p in prompts) < VOCAB
        wanted = sum(len(p) + OUTPUT_TOKENS for _, p in prompts) * TENANTS[engine].in_float32().kv_bytes_per_token
        assert wanted > KV_SHARE_BYTES
    acts = [act.message for one in ROUNDS for act in one.acts]
    assert {act.engine for act in acts if isinstance(act, Sleep)} == {"T1", "T2"}
    pins = {act.engine: act.units for act in acts if isinstance(act, Resize)}
    assert set(pins.values()) == {0}, "no engine stays pinned"
