"""Which requests the engines get: the traces' own, in order, and prompts that share what they should and nothing else."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from polder.bench.harness.driver import OpenLoop, measured_turns
from polder.bench.stages.equality import OUTPUT_TOKENS, SLEEPING_ENGINES, sleeping
from polder.bench.suites.tenants import KV_SHARE_BYTES, TenantsSuite
from polder.bench.workloads import agents as of
from polder.bench.workloads.models import MODEL_A, MODEL_B, layer_bytes, weights_bytes
from polder.bench.workloads.tenants import (
    MAX_MODEL_LEN,
    TENANTS,
    TURNS,
    VOCAB,
    conversations_begun,
    spatial,
    temporal,
)
from polder.bench.workloads.traces import TenantSlot
from polder.bench.workloads.traces import load as load_trace
from polder.broker.wire import Resize, Sleep


def test_kv_bytes_per_token_are_those_of_the_reference() -> None:
    assert (MODEL_A.kv_bytes_per_token, MODEL_B.kv_bytes_per_token) == (8 << 10, 4 << 10)
    assert MODEL_A.in_float32().kv_bytes_per_token == 16 << 10
    assert MODEL_A.fingerprint != MODEL_A.in_float32().fingerprint


def test_agents_play_their_sessions_in_order() -> None:
    load = of.agents(sessions=32)
    assert [turn.key for turn in load.users[3]] == [f"s{s}t{t}" for s in (3, 19) for t in range(16)]
    assert [turn.key for turn in load.users[3] if turn.cold_start] == ["s3t0"]
    assert measured_turns(of.agents(sessions=16)) == 256
    assert of.ideal_of(of.agents(sessions=16), 32) == pytest.approx(0.912, abs=0.001)
    beside = of.unmeasured(load)
    assert (measured_turns(beside), measured_turns(load), beside.stagger_s) == (0, 512, load.stagger_s)
    before, after = of.parted(load, 8)
    assert [turn.key for turn in before.users[3]] == [f"s{s}t{t}" for s in (3, 19) for t in range(8)]
    assert measured_turns(before) == measured_turns(after) == 256


def test_bursts_are_measured_once_and_go_on_as_load() -> None:
    turns = of.bursts(rounds=3).turns
    assert (sum(turn.measured for turn in turns), len(turns)) == (238, 3 * 238)
    assert (turns[238].at_s, turns[238].body) == (turns[0].at_s + 120, turns[0].body)
    assert len({turn.key for turn in turns}) == len(turns)
    assert of.bursts(time_scale=0.2).turns[-1].at_s == pytest.approx(turns[237].at_s / 5)


def test_blocks_hold_every_burst_request_once() -> None:
    blocks = of.one_by_one(blocks=17)
    keys = [turn.key for block in blocks for user in block.users for turn in user]
    assert sorted(keys) == sorted(turn.key for turn in of.bursts().turns)
    assert {len(user) for block in blocks for user in block.users} == {14}, "one request at a time"


def test_unique_prompts_share_no_block_and_chats_come_at_their_times() -> None:
    for at_a_time in (1, 4):
        blocks = of.unique_prompts(requests=40, scale=2, blocks=4, at_a_time=at_a_time)
        assert [len(block.users) for block in blocks] == [at_a_time] * 4
        turns = [turn for block in blocks for user in block.users for turn in user]
        assert len({tuple(json.loads(turn.body)["prompt"][:32]) for turn in turns}) == 40
    chats = of.chats().turns
    assert (len(chats), chats[-1].at_s) == (227, pytest.approx(119.553))
    assert all(len(json.loads(turn.body)["prompt"]) + turn.output_tokens <= 4224 for turn in chats)


def test_questions_repeat_and_share_prefixes() -> None:
    asked = of.questions("A", count=4, longest=300, seed=1)
    assert asked == of.questions("A", count=4, longest=300, seed=1)
    first, second, *_ = asked.values()
    assert second[: len(first) // 2] == first[: len(first) // 2]
    assert all(len(prompt) <= 300 for prompt in asked.values())


# ---------------------------------------------------------------------- tenants


@pytest.mark.parametrize("name", TENANTS)
def test_a_layers_bytes_are_those_of_the_model_that_is_built_and_fill_their_pages(name: str) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    recipe = TENANTS[name]
    config = transformers.LlamaConfig if recipe.family == "llama" else transformers.Qwen3Config
    model = transformers.LlamaForCausalLM if recipe.family == "llama" else transformers.Qwen3ForCausalLM
    shape = {"num_hidden_layers": 1, "hidden_size": recipe.hidden, "intermediate_size": recipe.intermediate}
    heads = {"num_attention_heads": recipe.heads, "num_key_value_heads": recipe.kv_heads, "head_dim": recipe.head_dim}
    with torch.device("meta"):
        built = model(config(**shape, **heads, vocab_size=8))
    assert layer_bytes(recipe) == 2 * sum(p.numel() for p in built.model.layers[0].parameters())
    assert layer_bytes(recipe.in_float32()) == 2 * layer_bytes(recipe)
    assert 0.98 < recipe.layers * layer_bytes(recipe) / weights_bytes(recipe) < 1


def test_the_trace_gives_each_model_its_turns() -> None:
    slots = load_trace(TenantSlot)
    assert "".join(slot.tenant[1] for slot in slots)[3:15] == "112233113221"
    assert Counter(slot.tenant for slot in slots).keys() == TENANTS.keys()
    loads = temporal(slots=range(3, 9), rate=1.0, seed=0)
    begun = {name: [turn.at_s for turn in load.turns if turn.key.endswith(".0")] for name, load in loads.items()}
    assert max(begun["T1"]) < 18 <= min(begun["T2"])
    assert max(begun["T2"]) < 36 <= min(begun["T3"])
    assert conversations_begun(slots[3], 100) == list(slots[3].starts), "no more than the trace has"


def prompts_of(load: OpenLoop) -> dict[str, list[int]]:
    return {turn.key: json.loads(turn.body)["prompt"] for turn in load.turns}


def test_a_rate_multiplies_conversations_and_a_seed_changes_prompts_alone() -> None:
    slots = range(*TenantsSuite.full.slots)
    counts = [sum(map(measured_turns, temporal(slots=slots, rate=r, seed=0).values())) for r in TenantsSuite.full.rates]
    assert counts == sorted(counts)
    assert counts[3] / counts[1] == pytest.approx(4, rel=0.1)
    once, again, other = (temporal(slots=slots, rate=1.0, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert [(t.key, t.at_s) for t in other["T1"].turns] != [] != once["T1"].turns
    assert prompts_of(other["T1"])["4.0.0"][:32] != prompts_of(once["T1"])["4.0.0"][:32]


def test_contexts_grow_share_their_past_and_fit_the_engine() -> None:
    for load in temporal(slots=range(*TenantsSuite.full.slots), rate=3.0, seed=0).values():
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


def test_two_models_are_always_in_use_in_the_spatial_stage() -> None:
    loads = spatial(users=8, seed=0)
    assert {name: len(load.users) for name, load in loads.items()} == {"T1": 8, "T2": 8}
    bodies = [turn.body for load in loads.values() for user in load.users for turn in user]
    assert len(set(bodies)) == len(bodies) == 256


def test_equality_of_tenants_asks_for_more_than_a_share_and_leaves_nobody_pinned() -> None:
    rounds = sleeping(0)
    for engine in SLEEPING_ENGINES:
        prompts = list(rounds[0].asked[engine].values())
        assert max(len(p) + OUTPUT_TOKENS for p in prompts) <= 1280
        assert max(max(p) for p in prompts) < VOCAB
        wanted = sum(len(p) + OUTPUT_TOKENS for p in prompts) * TENANTS[engine].in_float32().kv_bytes_per_token
        assert wanted > KV_SHARE_BYTES
    messages = [message for one in rounds for message in one.acts.values()]
    assert {message.engine for message in messages if isinstance(message, Sleep)} == set(SLEEPING_ENGINES)
    last = {message.engine: message.units for message in messages if isinstance(message, Resize)}
    assert set(last.values()) == {0}
