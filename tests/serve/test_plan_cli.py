"""`polder plan` answers from the command line alone, and says what is possible when what was asked for is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polder.cli.measure import measure_device
from polder.cli.plan import parse_tokens
from polder.errors import ConfigError
from tests.serve.test_cli import polder

ASKED = ("plan", "Qwen3-8B", "--device", "H200", "--host", "512GiB", "--neighbours", "H200:Qwen3-8B,H200:40GiB")


def figures(tmp_path: Path, *arguments: str) -> Any:
    path = tmp_path / "out" / "plan.json"
    done = polder(*arguments, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_every_source_has_its_contexts_up_to_its_longest(tmp_path: Path) -> None:
    found = figures(tmp_path, *ASKED, "--context", "1M", "--tbt-goal", "100ms")
    stock, host, peers = found["sources"]
    assert [source["name"] for source in found["sources"]] == ["stock vLLM", "window, host", "window, peers"]
    assert stock["longest_tokens"] < 1 << 20 < peers["longest_tokens"] < host["longest_tokens"]
    assert peers["size_bytes"] == found["local_kv_bytes"] + (40 << 30)
    assert (
        stock["longest_tokens"]
        == stock["within_goal_tokens"]
        < host["within_goal_tokens"]
        < peers["within_goal_tokens"]
    )
    asked = {o["source"]: o for o in found["outlooks"] if o["context_tokens"] == 1 << 20}
    assert [o["fits"] for o in asked.values()] == [False, True, True]
    assert asked["window, peers"]["tbt_s"] < asked["window, host"]["tbt_s"]
    for source in found["sources"]:
        shown = [o["context_tokens"] for o in found["outlooks"] if o["source"] == source["name"]]
        assert set(shown) == {8192, 16384, 32768, 40960, 1 << 20}, "up to the model's own limit, and what was asked for"
        assert shown == sorted(shown)


def test_the_tables_fit_a_terminal_and_say_where_figures_are_from() -> None:
    text = polder(*ASKED).stdout
    assert "window, host: 2 of 36 layers of a block local" in text
    assert "NCCL, issue 1264" in text
    assert "longer contexts need another rope_scaling" in text
    assert "…" not in text


def test_models_that_share_a_device_have_all_of_its_memory_in_turn(tmp_path: Path) -> None:
    found = figures(tmp_path, "plan", "Qwen3-8B", "Llama-3.1-8B", "gpt-oss-20b", "--device", "H100")
    assert found["kv_bytes"] > 20 << 30
    models = {model["model"]: model for model in found["models"]}
    floors = {name: model["floor_bytes"] for name, model in models.items()}
    assert floors["Llama-3.1-8B"] == models["Llama-3.1-8B"]["kv_bytes_per_token"] * 131072
    for outlook in found["outlooks"]:
        model = models[outlook["model"]]
        need = model["kv_bytes_per_token"] * outlook["context_tokens"]
        room = found["kv_bytes"] - sum(floors.values()) + model["floor_bytes"]
        assert model["pool_kv_bytes"] == room
        if outlook["model"] != "gpt-oss-20b":  # half of its layers have windows
            assert outlook["pooled"] == room // need
        assert outlook["alone"] >= outlook["pooled"]
    longest = {o["model"]: o["context_tokens"] for o in found["outlooks"]}
    assert longest == {"Qwen3-8B": 40960, "Llama-3.1-8B": 131072, "gpt-oss-20b": 131072}
    text = polder("plan", "Qwen3-8B", "Llama-3.1-8B", "--device", "H100").stdout
    assert "pool / slice" in text
    assert "…" not in text


def test_models_that_do_not_fit_together_take_turns(tmp_path: Path) -> None:
    found = figures(tmp_path, "plan", "Qwen3-32B", "Qwen3-30B-A3B", "--device", "A100")
    assert found["kv_bytes"] < 0
    assert all(outlook["sliced"] is None and outlook["pooled"] is None for outlook in found["outlooks"])
    assert all(outlook["alone"] > 0 for outlook in found["outlooks"])
    assert (
        "are missing. With elastic weights they take turns"
        in polder("plan", "Qwen3-32B", "Qwen3-30B-A3B", "--device", "A100").stdout
    )


def test_what_a_pool_cannot_take_is_said() -> None:
    tight = polder("plan", "Llama-3.1-8B", "Qwen3-30B-A3B", "--device", "H100", "--host", "1GiB", "--context", "64M")
    assert "Llama-3.1-8B 16 GiB, Qwen3-30B-A3B 3.75 GiB" in tight.stdout
    assert "Together that is 19.75 GiB, more than there is" in tight.stdout
    assert "--host, --context: for one model alone" in tight.stderr
    ample = polder("plan", "Qwen3-8B", "Qwen3-8B", "--device", "H100")
    assert "Qwen3-8B 5.625 GiB, Qwen3-8B 5.625 GiB" in ample.stdout
    assert "more than there is" not in ample.stdout
    assert ample.stderr == ""


def test_a_model_that_fits_in_no_turn_is_named() -> None:
    text = polder("plan", "Llama-3.1-70B", "Qwen3-30B-A3B", "--device", "H100").stdout
    assert "Llama-3.1-70B does not even fit while the others sleep" in text
    assert "Qwen3-30B-A3B does not even fit" not in text


def test_long_names_of_models_are_not_cut(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    models = (f'[[model]]\nname = "{"agents-" * 6}{end}"\npath = "Qwen/Qwen3-8B"\n' for end in "ab")
    fleet.write_text('[memory]\nkv_budget = "48GiB"\n' + "".join(models))
    assert "…" not in polder("plan", str(fleet), "--device", "H100").stdout


def test_a_fleet_file_is_planned_whatever_this_machine_has(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        '[memory]\ndevice = "cuda:7"\nkv_budget = "48GiB"\n[[model]]\nname = "chat"\npath = "Qwen/Qwen3-8B"\n'
        'max_model_len = 16384\n[[model]]\nname = "code"\npath = "Qwen/Qwen3-8B"\nargs = ["--kv-cache-dtype", "fp8"]\n'
    )
    found = figures(tmp_path, "plan", str(fleet), "--device", "H100")
    chat, code = found["models"]
    assert chat["kv_bytes_per_token"] == 2 * code["kv_bytes_per_token"] == 144 << 10
    assert max(o["context_tokens"] for o in found["outlooks"] if o["model"] == "chat") == 16384


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V2-Lite"])
def test_experts_latent_attention_and_windows_are_planned(tmp_path: Path, model: str) -> None:
    found = figures(tmp_path, "plan", model, "--device", "H100")
    assert all(0 < outlook["tbt_s"] < 0.1 for outlook in found["outlooks"])


def test_ranks_have_the_memory_of_all_and_copies_of_kv_that_cannot_be_split(tmp_path: Path) -> None:
    one, two, eight = (
        figures(tmp_path, "plan", "DeepSeek-V2-Lite", "--device", "H100", "--tensor-parallel-size", ranks)
        for ranks in ("1", "2", "8")
    )
    assert eight["device"]["memory_bytes"] == 8 * one["device"]["memory_bytes"]
    assert two["model"]["kv_bytes_per_token"] == 2 * one["model"]["kv_bytes_per_token"], "latent KV is on each rank"
    plain = figures(tmp_path, "plan", "Llama-3.1-70B", "--device", "H100", "--tensor-parallel-size", "4")
    assert plain["model"]["kv_bytes_per_token"] == 320 << 10


def test_without_external_memory_there_is_stock_alone(tmp_path: Path) -> None:
    found = figures(tmp_path, "plan", "Qwen3-8B", "--device", "H200")
    assert [source["name"] for source in found["sources"]] == ["stock vLLM"]


def test_a_context_that_nothing_holds_is_refused_with_what_is_possible() -> None:
    done = polder(*ASKED, "--context", "64M")
    assert done.returncode == 2
    assert done.stderr.startswith("polder: context: 67,108,864 tokens do not fit. The longest context possible is ")
    assert "with window, peers" in done.stderr


def test_one_layer_local_reaches_further_and_hides_less(tmp_path: Path) -> None:
    wide, narrow = (figures(tmp_path, *ASKED, "--window", w, "--context", "1M")["sources"][1] for w in ("2", "1"))
    assert narrow["longest_tokens"] > wide["longest_tokens"]


def test_own_figures_and_links(tmp_path: Path) -> None:
    own = ("plan", "Qwen3-8B", "--device", "memory=24GiB,bandwidth=1TB/s,flops=100T", "--host", "64GiB")
    found = figures(tmp_path, *own, "--link", "20GB/s", "--chunk", "2k")
    assert found["sources"][1]["link"]["bytes_per_s"] == 20e9
    assert "give --link host=55GB/s" in polder(*own).stderr


def test_the_slowest_neighbour_sets_the_pace(tmp_path: Path) -> None:
    found = figures(tmp_path, "plan", "Qwen3-8B", "--device", "H200", "--neighbours", "H200:1GiB,A100-80:1GiB")
    assert found["sources"][1]["link"]["name"] == "NVLink 3"


def test_the_tables_are_written_as_html(tmp_path: Path) -> None:
    path = tmp_path / "out" / "plan.html"
    assert polder(*ASKED, "--tbt-goal", "50ms", "--html", str(path)).returncode == 0
    assert "window, peers" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Qwen3-8B",), "Missing option '--device'"),
        (("Qwen3-8B", "--device", "H200", "--neighbours", "40GiB"), "neighbours: cannot read"),
        (("Qwen3-8B", "--device", "H200", "--neighbours", "H100:Llama-3.1-70B"), "Llama-3.1-70B: 131.4 GiB"),
        (("Qwen3-8B", "--device", "H200", "--window", "37"), "window: 37 of 36 layers"),
        (("Qwen3-8B", "--device", "H200", "--tbt-goal", "0ms"), "tbt-goal"),
        (("Llama-3.1-70B", "--device", "H100"), "131.4 GiB of weights"),
        (("gpt-oss-20b", "--device", "H100", "--host", "64GiB"), "window is for full attention only"),
        (("owner/unknown", "--device", "H100"), "no network is asked"),
        (("owner/Llama-3.1-8B-Instruct", "--device", "H100"), "Llama-3.1-8B has the sizes of its fine-tuned variants"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments: tuple[str, ...], words: str) -> None:
    done = polder("plan", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(("text", "tokens"), [("256k", 262144), ("1M", 1 << 20), ("5000", 5000), ("8K", 8192)])
def test_tokens_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_tokens(text, what="context") == tokens


@pytest.mark.parametrize("text", ["0", "k", "1.5M", "-1", "12G"])
def test_other_tokens_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="context: cannot read"):
        parse_tokens(text, what="context")


def test_this_machine_can_be_measured() -> None:
    found = measure_device()
    assert found.memory_bytes > 1 << 28
    assert min(found.memory_bytes_per_s, found.flops_per_s, found.attention_flops_per_s) > 1e6
    assert found.host_link is not None
    assert "measured here" in found.source
