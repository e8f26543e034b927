"""A bad fleet file is refused with the file, the key and what to write, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polder.errors import BudgetError, ConfigError, UsageError
from polder.serve.fleet import load_fleet

GOOD = """
[memory]
kv_budget = "320MiB"
device = "cpu:0"
[[model]]
name = "a"
path = "{model}"
max_model_len = 4096
args = ["--block-size", "32"]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """8 layers of 4 KV heads x 64 in bf16: 8 KiB a token."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 512,
        "dtype": "bfloat16",
        "max_position_embeddings": 8192,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return path


def test_a_good_file_says_what_it_says(tmp_path: Path, model: Path) -> None:
    fleet = load_fleet(write(tmp_path, GOOD.format(model=model)))
    assert (fleet.host, fleet.port, fleet.device) == ("127.0.0.1", 8000, "cpu:0")
    assert fleet.budget_bytes == 320 << 20
    assert fleet.models[0].environment(Path("/s"))["POLDER_BROKER"] == "/s"
    assert fleet.models[0].arguments() == ("--max-model-len", "4096", "--block-size", "32")
    # 4,096 tokens are 128 blocks and the null block: 3 units of 64 blocks, each 2 MiB in 8 layers.
    assert fleet.models[0].least_bytes(2 << 20) == 3 * 8 * (2 << 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[memory]", "[memory"), "is not TOML"),
        (('kv_budget = "320MiB"', ""), "kv_budget"),
        (('kv_budget = "320MiB"', 'kv_budget = "320MB"'), "memory.kv_budget: cannot read '320MB'"),
        (('device = "cpu:0"', 'devise = "cpu:0"'), "devise"),
        (('name = "a"', 'name = "a b"'), "model name 'a b'"),
        (("max_model_len = 4096", 'max_model_len = "long"'), "max_model_len"),
        (("max_model_len = 4096", 'floor = "x"'), "model a: floor"),
        (("[memory]", "[server]\nport = 99999\n[memory]"), "server.port 99999"),
        (("[memory]", "[memory]\nreserve_low = 0.9"), "reserve watermarks"),
        (("[memory]", '[memory]\nhold = "soon"'), "memory.hold"),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, model: Path, change: tuple[str, str], words: str) -> None:
    path = write(tmp_path, GOOD.format(model=model).replace(*change))
    with pytest.raises(UsageError, match=words) as raised:
        load_fleet(path)
    assert "fleet.toml" in str(raised.value)


def test_names_must_differ(tmp_path: Path, model: Path) -> None:
    text = GOOD.format(model=model)
    with pytest.raises(ConfigError, match="given twice"):
        load_fleet(write(tmp_path, text + text[text.index("[[model]]") :]))


def test_no_model_is_no_fleet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        load_fleet(write(tmp_path, 'model = []\n[memory]\nkv_budget = "1GiB"\n'))


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json in .*nowhere"):
        load_fleet(write(tmp_path, GOOD.format(model=tmp_path / "nowhere")))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        load_fleet(tmp_path / "none.toml")


def test_a_budget_too_small_says_how_much_is_needed(tmp_path: Path, model: Path) -> None:
    text = GOOD.format(model=model)
    second = text[text.index("[[model]]") :].replace('name = "a"', 'name = "b"')
    with pytest.raises(BudgetError, match=r"a 48 MiB, b 48 MiB.*Raise kv_budget to 96 MiB"):
        load_fleet(write(tmp_path, text.replace("320MiB", "64MiB") + second))
