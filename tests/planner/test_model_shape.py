"""Sizes are the published ones, and a model that the arithmetic does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polder.errors import ConfigError
from polder.planner.devices import DEVICES, parse_device, parse_links, parse_rate
from polder.planner.model_shape import KNOWN, ModelShape, model_shape

LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def write(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shape_of(folder: Path) -> ModelShape:
    return model_shape(str(folder))


@pytest.mark.parametrize(
    ("name", "billions", "kib"),
    [
        ("Qwen3-8B", 8.2, 144),
        ("Qwen3-14B", 14.8, 160),
        ("Qwen3-32B", 32.8, 256),
        ("Llama-3.1-8B", 8.0, 128),
        ("Llama-3.1-70B", 70.6, 320),
        ("LWM-7B-1M", 6.7, 512),
        ("Llama-3.2-1B", 1.24, 32),
        ("Qwen2.5-7B", 7.6, 56),
        ("Qwen3-30B-A3B", 30.5, 96),
        ("gpt-oss-20b", 20.9, 48),
        ("DeepSeek-V2-Lite", 15.7, 30.375),
    ],
)
def test_parameters_and_kv_are_those_published(name: str, billions: float, kib: float) -> None:
    shape = KNOWN[name]
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.05)
    assert shape.kv_bytes_per_token == kib * 1024


def test_a_folder_gives_what_the_list_has(tmp_path: Path) -> None:
    found, known = shape_of(write(tmp_path)), KNOWN["Llama-3.1-8B"]
    assert (found.weight_bytes, found.kv_bytes_per_token) == (known.weight_bytes, known.kv_bytes_per_token)
    assert found.trained_tokens == known.trained_tokens
    assert model_shape(str(tmp_path)) == found


def test_names_are_found_with_their_organisation_and_in_any_case() -> None:
    assert model_shape("Qwen/qwen3-8b") == KNOWN["Qwen3-8B"]


def test_keys_left_out_have_the_usual_meaning(tmp_path: Path) -> None:
    found = shape_of(write(tmp_path, num_key_value_heads=None, torch_dtype=None, max_position_embeddings=None))
    assert (found.kv.kv_heads, found.kv.head_dim, found.element_bytes, found.trained_tokens) == (32, 128, 2, None)
    tied = shape_of(write(tmp_path, tie_word_embeddings=True, head_dim=64))
    assert tied.kv.head_dim == 64
    assert tied.parameters == tied.layers * tied.layer_parameters + tied.head_parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 512}, "qk_rope_head_dim in config.json is None"),
        ({"mamba_d_state": 16}, "state space"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "different kinds of attention"),
        ({"torch_dtype": "int8"}, "weights of a type"),
        ({"intermediate_size": None}, "intermediate_size in config.json is None"),
        ({"num_key_value_heads": [8, 4]}, "num_key_value_heads in config.json is"),
    ],
)
def test_what_the_arithmetic_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape_of(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({"sliding_window": 4096}, 32),
        ({"sliding_window": 4096, "sliding_window_pattern": 4}, 24),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}, 4),
        ({"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"] * 16}, 16),
        ({}, 0),
    ],
)
def test_layers_with_a_window_keep_no_more_than_it(tmp_path: Path, changes: dict[str, Any], windowed: int) -> None:
    shape = shape_of(write(tmp_path, **changes))
    assert shape.kv.windowed_layers == windowed
    of_layer = shape.kv_bytes_of_layer
    assert shape.kv_bytes(100_000) == of_layer * (100_000 * (32 - windowed) + min(4096, 100_000) * windowed)


@pytest.mark.parametrize(
    ("quantisation", "part"),
    [
        (None, 1.0),
        ({"quant_method": "fp8"}, 0.5),
        ({"quant_method": "awq", "bits": 4}, 0.265),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 0.5),
    ],
)
def test_quantised_weights_take_less_and_embeddings_stay(tmp_path: Path, quantisation: Any, part: float) -> None:
    plain, shape = shape_of(write(tmp_path)), shape_of(write(tmp_path, quantization_config=quantisation))
    assert shape.layer_weight_bytes == pytest.approx(part * plain.layer_weight_bytes)
    assert shape.weight_bytes - shape.layer_weight_bytes == plain.weight_bytes - plain.layer_weight_bytes


def test_tokens_of_a_batch_read_the_experts_that_they_choose() -> None:
    shape = KNOWN["Qwen3-30B-A3B"]
    one, two, many = (shape.used_parameters(rows)[0] for rows in (1, 2, 1000))
    assert two - one == 8 * shape.expert_parameters
    assert many - one == 120 * shape.expert_parameters
    assert shape.used_parameters(1)[1] == shape.used_parameters(1000)[1] == one


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 131072),
        ({"rope_type": "yarn", "factor": 4.0}, 131072),
        ({"type": "linear", "factor": 2.0}, 262144),
        ({"rope_type": "default", "rope_theta": 1e6}, 131072),
    ],
)
def test_the_models_own_limit_is_the_one_that_vllm_derives(tmp_path: Path, rope: Any, limit: int) -> None:
    assert shape_of(write(tmp_path, rope_scaling=rope)).trained_tokens == limit


def test_a_window_that_is_not_used_is_none(tmp_path: Path) -> None:
    assert shape_of(write(tmp_path, sliding_window=4096, use_sliding_window=False)).layers == 32


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_cannot_be_read_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json"):
        shape_of(tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Qwen3-14B"):
        model_shape("none/such")


# ---------------------------------------------------------------- devices


def test_every_preset_says_where_it_is_from() -> None:
    for device in DEVICES.values():
        assert device.source
        assert device.host_link is not None
        assert device.peer_link is not None
        assert device.host_link.source
        assert device.peer_link.source
        assert device.host_link.bytes_per_s < device.memory_bytes_per_s
    assert parse_device("rtx 4090") == DEVICES["RTX4090"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(("A100", "A100-80"), ("A100-80GB", "A100-80"), ("NVIDIA H100", "H100"), ("h100-sxm5", "H100")),
        *(("L4", "L4"), ("MI300X", "MI300X"), ("4090", "RTX4090"), ("GeForce RTX 3090", "RTX3090"), ("24GB", "24GB")),
    ],
)
def test_devices_are_known_by_the_names_that_people_use(text: str, name: str) -> None:
    assert parse_device(text) == DEVICES[name]


def test_own_figures_are_taken_as_they_stand() -> None:
    own = parse_device("memory=80GiB,bandwidth=3TB/s,flops=0.7P,attention=400T")
    assert (own.memory_bytes, own.memory_bytes_per_s) == (80 << 30, 3e12)
    assert (own.flops_per_s, own.attention_flops_per_s) == (0.7e15, 400e12)
    assert own.host_link is None
    assert parse_device("memory=80GiB,bandwidth=3TB/s,flops=7T").attention_flops_per_s == pytest.approx(5e12)


def test_own_links_replace_the_presets() -> None:
    host = parse_links("24GiB/s", DEVICES["H20"])
    assert host.host_link is not None
    assert host.host_link.bytes_per_s == 24 << 30
    assert host.peer_link == DEVICES["H20"].peer_link
    both = parse_links("host=1GB/s, peer=2GB/s", DEVICES["H20"])
    assert both.peer_link is not None
    assert both.peer_link.bytes_per_s == 2e9


@pytest.mark.parametrize(
    "text", ["A9000", "memory=80GiB", "memory=80GiB,bandwidth=3,flops=1T", "speed=1", "memory=1GiB,x"]
)
def test_a_device_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        parse_device(text)


@pytest.mark.parametrize("text", ["55", "0GB/s", "fast", "55Gb/s", "-1GB/s"])
def test_a_rate_has_a_unit_and_is_above_0(text: str) -> None:
    with pytest.raises(ConfigError, match="link: cannot read"):
        parse_rate(text, what="link")
