"""What arms are made of: the same bytes in all of them, and fleet files that `polder serve` reads."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polder.bench.harness.arms import ArmGroup, ArmPool, ArmSpec, serves
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan, fleet_toml
from polder.bench.stages.equality import taking_back
from polder.bench.suites import tenants
from polder.bench.suites.context import ContextSuite
from polder.bench.suites.elastic import BUDGET_BYTES, ElasticSuite
from polder.bench.suites.tenants import KV_SHARE_BYTES, TenantsSuite
from polder.bench.suites.turns import ARMS, EQUALITY_BYTES, LOAD_BYTES, TurnsSuite
from polder.bench.workloads.models import MODEL_A, MODEL_B, weights_bytes
from polder.bench.workloads.tenants import MAX_MODEL_LEN, TENANTS
from polder.memory.page import PAGE_BYTES
from polder.serve.fleet import load_fleet
from tests.bench.fake_server import FakeEngine, serving
from tests.bench.fakes import FakeArm, no_waiting

MIB = 1 << 20


@pytest.fixture
def arm_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ArmSpec]:
    no_waiting(monkeypatch)
    suites = {"elastic": ElasticSuite, "turns": TurnsSuite, "tenants": TenantsSuite, "context": ContextSuite}

    def of(suite: str, name: str, **plan: Any) -> ArmSpec:
        from dataclasses import replace

        made: Any = suites[suite]
        return made(replace(made.quick, **plan), workdir=tmp_path).arm(name)  # type: ignore[no-any-return]

    return of


def fleet(spec: ArmSpec) -> dict[str, Any]:
    assert spec.system == "polder"
    return tomllib.loads(fleet_toml(spec.engines, 8123))


def test_the_elastic_arms_have_the_same_bytes_to_the_block_and_no_tiers(arm_of: Callable[..., ArmSpec]) -> None:
    for name in ("stock", "polder"):
        used = sum(e.blocks * BLOCK_TOKENS * e.recipe.kv_bytes_per_token for e in arm_of("elastic", name).engines)
        assert used == BUDGET_BYTES
    found = fleet(arm_of("elastic", "polder"))
    assert "host" not in found["memory"]
    assert all(not {"tiers", "host", "lend", "floor", "ceiling"} & model.keys() for model in found["model"])


@pytest.mark.parametrize(
    ("arm", "host", "tiers", "lend"),
    [
        ("polder", 256 * MIB, ["peer", "host"], 96 * MIB),
        ("polder-host", 256 * MIB, ["host"], None),
        ("polder-peer", None, ["peer"], 96 * MIB),
    ],
)
def test_arms_with_tiers_differ_in_nothing_but_what_stands_behind_the_pool(
    arm: str, host: int | None, tiers: list[str], lend: int | None, arm_of: Callable[..., ArmSpec]
) -> None:
    found = fleet(arm_of("turns", arm))
    a, b = found["model"]
    assert found["memory"].get("host") == a.get("host") == host
    assert (a["tiers"], b.get("tiers")) == (tiers, None)
    assert (a.get("lend"), b.get("lend")) == (None, lend)
    for model in (a, b):
        assert model["floor"] == model["share"] == model["ceiling"] == 128 * MIB
    assert a["env"]["POLDER_LINKS"] == "peer=3200MB/s,host=400MB/s"
    assert "POLDER_LINKS" not in fleet(arm_of("turns", arm, links="none"))["model"][0]["env"]
    for engine, plain in zip(arm_of("turns", arm).engines, arm_of("turns", "stock").engines, strict=True):
        assert (engine.blocks, engine.arguments()) == (plain.blocks, plain.arguments())


def test_native_offloading_has_the_bytes_of_both_tiers_behind_the_host_link(arm_of: Callable[..., ArmSpec]) -> None:
    def config(**plan: Any) -> dict[str, Any]:
        a, _ = arm_of("turns", "native", **plan).engines
        return json.loads(a.extra_args[1])  # type: ignore[no-any-return]

    extra = config()["kv_connector_extra_config"]
    assert (extra["cpu_bytes_to_use"], extra["link_bytes_per_s"]) == (LOAD_BYTES.host + LOAD_BYTES.lend_b, 400e6)
    assert config()["kv_load_failure_policy"] == "recompute"
    assert "link_bytes_per_s" not in config(links="none")["kv_connector_extra_config"]
    per_token = MODEL_A.kv_bytes_per_token
    assert [size // per_token for size in (LOAD_BYTES.pool_a, LOAD_BYTES.host, LOAD_BYTES.lend_b)] == [
        16384,
        32768,
        12288,
    ]
    assert len(ARMS) == 5


def test_equality_of_turns_asks_for_more_than_the_pool_holds_and_each_tier_holds_it() -> None:
    rounds = taking_back(seed=0)
    of_a = list(rounds[0].asked["A"].values())
    per_token = MODEL_A.in_float32().kv_bytes_per_token
    blocks = {tuple(prompt[: end + 32]) for prompt in of_a for end in range(0, len(prompt) - 31, 32)}
    assert 32 * len(blocks) > 2 * EQUALITY_BYTES.pool_a // per_token
    assert 32 * len(blocks) + 96 * len(of_a) < min(EQUALITY_BYTES.host, EQUALITY_BYTES.lend_b) // per_token
    of_b = sum(len(prompt) + 96 for prompt in rounds[1].asked["B"].values())
    left_to_b = EQUALITY_BYTES.pool_b - EQUALITY_BYTES.lend_b
    assert of_b * MODEL_B.in_float32().kv_bytes_per_token > left_to_b, "B needs what it lent"


def test_all_tenants_arms_have_the_same_bytes_and_weights_are_over_half_of_them(arm_of: Callable[..., ArmSpec]) -> None:
    weights = sum(map(weights_bytes, TENANTS.values()))
    assert fleet(arm_of("tenants", "kv-only"))["memory"]["kv_budget"] == 3 * KV_SHARE_BYTES
    assert fleet(arm_of("tenants", "polder"))["memory"]["budget"] == tenants.BUDGET_BYTES
    assert weights + 3 * KV_SHARE_BYTES == tenants.BUDGET_BYTES < 2 * weights
    engines = arm_of("tenants", "stock").engines
    assert sum(e.blocks * BLOCK_TOKENS * e.recipe.kv_bytes_per_token for e in engines) == 3 * KV_SHARE_BYTES
    assert all(engine.blocks * BLOCK_TOKENS > MAX_MODEL_LEN for engine in engines)
    assert {engine.batched_tokens for engine in arm_of("tenants", "stock-short").engines} == {256}


def test_only_polders_weights_are_elastic_and_all_engines_compute_on_one_core(arm_of: Callable[..., ArmSpec]) -> None:
    assert [model.get("weights") for model in fleet(arm_of("tenants", "kv-only"))["model"]] == [None] * 3
    models = fleet(arm_of("tenants", "polder"))["model"]
    assert [model["weights"] for model in models] == ["elastic"] * 3
    assert len({model["env"]["VLLM_CPU_OMP_THREADS_BIND"] for model in models}) == 1
    assert {model["env"]["POLDER_TBT_GOAL"] for model in models} == {"400ms"}
    whole, streamed = (
        fleet(arm_of("tenants", name))["model"][0]["env"] for name in ("polder-whole-link", "polder-link")
    )
    assert (whole["POLDER_WAKE"], streamed["POLDER_WAKE"]) == ("whole", "streamed")
    assert whole["POLDER_LINKS"] == "weights=1000MB/s"


def test_every_context_arm_but_enough_has_the_same_bytes(arm_of: Callable[..., ArmSpec]) -> None:
    plan = ContextSuite.quick
    engines = {arm: arm_of("context", arm).engines[0] for arm in plan.arms}
    assert {e.share_bytes for arm, e in engines.items() if arm != "enough"} == {plan.local_bytes}
    assert engines["enough"].blocks * BLOCK_TOKENS > plan.longest("enough")
    found = fleet(arm_of("context", "window-4"))
    assert found["model"][0]["window_layers"] == 4
    assert found["memory"]["host"] == found["model"][0]["window"]
    assert found["memory"]["page"] == plan.page_bytes != PAGE_BYTES


@pytest.mark.parametrize("arm", ["kv-only", "polder"])
def test_the_fleet_file_is_one_that_polder_serve_reads(
    arm: str, arm_of: Callable[..., ArmSpec], tmp_path: Path
) -> None:
    spec = arm_of("tenants", arm)
    for engine in spec.engines:
        r = engine.recipe
        engine.model_path().mkdir(parents=True)
        heads = {"num_attention_heads": r.heads, "num_key_value_heads": r.kv_heads, "head_dim": r.head_dim}
        sizes = {"hidden_size": r.hidden, "intermediate_size": r.intermediate, "vocab_size": r.vocab}
        (engine.model_path() / "config.json").write_text(json.dumps({"num_hidden_layers": r.layers, **heads, **sizes}))
    path = tmp_path / "fleet.toml"
    path.write_text(fleet_toml(spec.engines, 8123))
    read = load_fleet(path)
    assert (read.server.port, read.device) == (8123, "cpu:0")
    assert read.budget_bytes == (tenants.BUDGET_BYTES if arm == "polder" else 3 * KV_SHARE_BYTES)
    assert "--enable-prefix-caching" in read.models[0].args


def group_of(arm: type[FakeArm], journal: list[str], prepared: list[str], suffix: str = "") -> ArmGroup:
    class Spec(ArmSpec):
        def make(self, name: str, logs: Path, runtime: Path) -> FakeArm:
            return arm(name, self, logs, journal)

    spec = Spec("stock", [])
    return ArmGroup(lambda _: spec, suffix, 2, lambda up: prepared.append(up.name))


def test_at_most_two_arms_are_up_and_the_one_used_longest_ago_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_waiting(monkeypatch)
    journal: list[str] = []
    prepared: list[str] = []
    group = group_of(FakeArm, journal, prepared)
    with ArmPool(tmp_path, lambda _: None) as pool:
        for name in ("stock", "polder", "native", "native", "polder"):
            assert pool.get(group, name).name == name
    assert journal[:4] == ["stock", "polder", "stop stock", "native"]
    assert prepared == ["stock", "polder", "native"]
    assert journal[-2:] == ["stop native", "stop polder"]


def test_arms_of_another_group_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_waiting(monkeypatch)
    journal: list[str] = []
    with ArmPool(tmp_path, lambda _: None) as pool:
        for suffix in ("", "-equality"):
            pool.get(group_of(FakeArm, journal, [], suffix), "stock")
    assert journal == ["stock", "stop stock", "stock-equality", "stop stock-equality"]


def test_an_arm_that_never_gets_ready_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeArm):
        def wait_ready(self) -> None:
            raise RuntimeError("no engine")

    no_waiting(monkeypatch)
    journal: list[str] = []
    with pytest.raises(RuntimeError), ArmPool(tmp_path, lambda _: None) as pool:
        pool.get(group_of(Broken, journal, []), "stock")
    assert journal == ["stock", "stop stock"]


def test_a_program_that_took_an_engines_port_is_not_that_engine() -> None:
    with serving(FakeEngine(model="A")) as other:
        assert serves(other.url, "A")
        assert not serves(other.url, "B")
    assert not serves(other.url, "A")


def test_an_engine_is_named_in_the_fleet_file_with_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_waiting(monkeypatch)
    sizes = {"max_model_len": 1024, "share_bytes": MIB}
    engine = EnginePlan(name="A", recipe=MODEL_A, models=tmp_path, cores=(0, 1), **sizes)  # type: ignore[arg-type]
    (model,) = tomllib.loads(fleet_toml([engine], 1))["model"]
    assert (model["cpus"], model["env"]["VLLM_CPU_OMP_THREADS_BIND"]) == ("0,1", "0")
