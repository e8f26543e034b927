"""A user's fleet as two arms: the same bytes in both, the user's tables in one, plain vLLM in the other."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.bench.harness.fleets import FleetSpec, OwnFleet, fixed_parts, load_own, on_own_disks
from polder.broker.policy import PolicyConfig
from polder.engines.vllm.settings import EngineSettings
from polder.errors import BudgetError, ConfigError
from polder.serve.fleet import Fleet, Model, load_fleet
from polder.serve.schema import ServerTable
from tests.bench.fakes import own_fleet
from tests.conftest import examples

MIB = 1 << 20


def own(tmp_path: Path, *keys: dict[str, Any], **memory: Any) -> OwnFleet:
    return load_own(own_fleet(tmp_path, *keys, **memory))


def served(found: OwnFleet, tmp_path: Path) -> Fleet:
    """The Polder arm's file, read as `polder serve` reads it."""
    path = tmp_path / "elsewhere" / "fleet.toml"
    path.parent.mkdir()
    path.write_text(FleetSpec("polder", found).fleet_file(8123))
    return load_fleet(path)


def options(argv: tuple[str, ...]) -> dict[str, str]:
    return {word: argv[at + 1] for at, word in enumerate(argv[:-1]) if word.startswith("--")}


models = st.lists(st.tuples(st.integers(0, 40), st.none() | st.integers(1, 60)), min_size=1, max_size=5)


@examples(200)
@given(models, st.integers(0, 100))
def test_parts_are_the_whole_budget_and_hold_a_request_of_each(given: list[tuple[int, int | None]], more: int) -> None:
    least = sum(need for need, _ in given)
    fleet = Fleet(
        server=ServerTable(),
        device="cpu:0",
        budget_bytes=1000 * max(1, least + more),
        page_bytes=1000,
        policy=PolicyConfig(),
        models=tuple(
            Model(
                path="m",
                settings=EngineSettings(engine=str(number), kv_share_bytes=share and 1000 * share),
                least_bytes=1000 * need,
            )
            for number, (need, share) in enumerate(given)
        ),
    )
    parts = fixed_parts(fleet)
    assert 0 <= fleet.budget_bytes - sum(parts.values()) < 2 * len(given), "less than a block for each model"
    assert all(parts[model.name] >= (model.least_bytes or 0) for model in fleet.models)
    if not any(share for _, share in given) and len({need for need, _ in given}) == 1:
        assert max(parts.values()) == min(parts.values())


def test_a_share_of_the_file_is_the_models_part(tmp_path: Path) -> None:
    assert fixed_parts(own(tmp_path, {"share": "20MiB"}).fleet) == {"docs": 20 * MIB, "chat-1.5": 44 * MIB}


def test_elastic_weights_are_taken_from_stocks_kv_memory(tmp_path: Path) -> None:
    given = [{"weights": "elastic"}] * 2
    memory = {"kv_budget": 0, "budget": "128MiB"}
    fleet = own(tmp_path, *given, **memory).fleet
    layer = 2 * (512 * (2 * 512 + 2 * 256) + 3 * 512 * 1408)  # bf16, without norms
    pages = -(-layer // (2 * MIB))
    assert sum(fixed_parts(fleet).values()) == 128 * MIB - 2 * 2 * pages * 2 * MIB


def test_models_that_stock_cannot_hold_at_once_are_refused(tmp_path: Path) -> None:
    fleet = own(tmp_path, *[{"weights": "elastic"}] * 2, kv_budget=0, budget="28MiB").fleet
    with pytest.raises(BudgetError, match=r"plain vLLM cannot hold these models at once: .*`--arms polder`"):
        fixed_parts(fleet)


def test_the_polder_arm_has_the_users_tables_from_wherever_its_file_lies(tmp_path: Path) -> None:
    keys = {"share": "20MiB", "args": ["--dtype", "float32"], "env": {"GREETING": 'a "b" ü'}, "tbt_goal": "200ms"}
    mine = own(tmp_path, keys, page="1MiB")
    found = served(mine, tmp_path)
    docs, chat = found.models
    assert (found.server.port, found.budget_bytes, found.page_bytes) == (8123, 64 * MIB, MIB)
    assert docs.settings == mine.fleet.models[0].settings
    assert docs.path == str(tmp_path / "own")
    assert docs.args == ("--dtype", "float32", "--enable-prompt-tokens-details")
    assert docs.env == {"GREETING": 'a "b" ü', "VLLM_SERVER_DEV_MODE": "1"}
    assert chat.settings == mine.fleet.models[1].settings


def test_the_stock_arm_is_plain_vllm_with_the_users_arguments(tmp_path: Path) -> None:
    env = {"VLLM_PLUGINS": "mine,polder", "OMP_NUM_THREADS": "1"}
    mine = own(tmp_path, {"args": ["--seed", "3"], "env": env, "tiers": ["host"]}, host="32MiB")
    spec = FleetSpec("stock", mine).stock(0, 8123, tmp_path)
    given = options(spec.argv)
    assert (given["--seed"], given["--max-model-len"], given["--port"]) == ("3", "512", "8123")
    assert given["--kv-cache-memory-bytes"] == str(32 * MIB)
    assert "--kv-transfer-config" not in given
    assert spec.env["VLLM_PLUGINS"] == "mine"
    assert not [name for name in spec.env if name.startswith("POLDER")]


def test_a_stock_engine_starts_on_a_gpu_of_which_others_have_a_part(tmp_path: Path) -> None:
    spec = FleetSpec("stock", own(tmp_path, device="cuda:1")).stock(1, 8123, tmp_path)
    given = options(spec.argv)
    assert (given["--device-ids"], given["--gpu-memory-utilization"]) == ("1", "0.01")


def test_what_is_on_the_users_disks_is_left_alone_and_the_benchs_own_is_gone_at_the_end(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "docs").mkdir(parents=True)
    keys = {"tiers": ["host", "disk"]}
    mine = own(tmp_path, keys, host="32MiB", disks=[f"{disk}:1GiB"])
    with on_own_disks(mine) as empty:
        ((path, size),) = served(empty, tmp_path).models[0].settings.disks
        assert Path(path).parent.parent == disk
        assert size == 1 << 30
    assert list(disk.iterdir()) == [disk / "docs"]
    assert mine.tables == tomllib.loads((tmp_path / "fleet.toml").read_text())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"args": ["--num-gpu-blocks-override", "9"]}, "docs: --num-gpu-blocks-override: leave it out"),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "4"}}, "docs: VLLM_CPU_KVCACHE_SPACE: leave it out"),
        ({"max_model_len": "auto"}, "docs: write max_model_len as a number"),
        ({"path": "someone/unknown"}, "'someone/unknown' is not on this machine: fetch it first"),
        ({"name": "all"}, "model all: give it another name"),
    ],
)
def test_fleets_that_cannot_be_compared_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        own(tmp_path, keys)
