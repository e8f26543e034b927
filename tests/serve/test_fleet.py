"""A bad fleet file is refused with the file, the key and what to write, before anything is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polder.broker.policy import PolicyConfig
from polder.engines.vllm.settings import EngineSettings, read_settings
from polder.errors import BudgetError, ConfigError, UsageError
from polder.serve.arguments import option
from polder.serve.budget import least_kv_bytes
from polder.serve.fleet import EXAMPLE, Model, load_fleet
from polder.serve.schema import ServerTable
from polder.serve.specs import Place, broker_spec, model_spec
from polder.units import parse_goal, parse_seconds, seconds_text

MIB = 1 << 20
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
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 512,
    "dtype": "bfloat16",
    "max_position_embeddings": 8192,
}
"""8 layers of 4 KV heads x 64 in bf16: 8 KiB a token."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder_of(tmp_path, CONFIG)


def folder_of(tmp_path: Path, config: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return path


def test_a_good_file_says_what_it_says(tmp_path: Path, model: Path) -> None:
    fleet = load_fleet(write(tmp_path, GOOD.format(model=model)))
    assert (fleet.server.host, fleet.server.port, fleet.device) == ("127.0.0.1", 8000, "cpu:0")
    assert fleet.budget_bytes == 320 * MIB
    assert fleet.models[0].arguments() == ("--max-model-len", "4096", "--block-size", "32")
    # 4,096 tokens are 128 blocks and the null block: 3 units of 64 blocks, each 2 MiB in 8 layers.
    assert fleet.models[0].least_bytes == 3 * 8 * 2 * MIB
    assert fleet.broker(Path("/s")).devices == {"cpu:0": 320 * MIB}


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "http://0.0.0.0:80"), ("::1", "http://[::1]:80")])
def test_an_address_is_written_as_clients_write_it(host: str, url: str) -> None:
    assert ServerTable(host=host, port=80).url == url


def test_every_key_of_the_example_is_taken(tmp_path: Path, model: Path) -> None:
    folder_of(tmp_path, CONFIG | {"num_hidden_layers": 2})
    for disk in ("nvme0", "nvme1"):
        (tmp_path / disk).mkdir()
    text = EXAMPLE.replace("/models/llama", str(model)).replace("/mnt/", f"{tmp_path}/")
    fleet = load_fleet(write(tmp_path, text))
    chat = fleet.models[0]
    given = read_settings({}, "", chat.environment(Path("/s")))
    assert given == replace(chat.settings, broker=Path("/s")), "an engine reads what the file says"
    assert (given.kv_floor_bytes, given.kv_share_bytes, given.kv_ceiling_bytes) == (64 * MIB, 160 * MIB, 1024 * MIB)
    assert (given.tiers, given.tbt_goal_s, given.disk_writes_bytes) == (("peer", "host", "disk"), 0.2, 500 << 30)
    assert given.disks == tuple((f"{tmp_path}/nvme{n}/chat", 400 << 30) for n in range(2))
    environment = chat.environment(Path("/s"))
    assert environment["POLDER_KV_BUDGET"] == "", "what the shell had set is undone"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert fleet.policy == PolicyConfig()


@pytest.mark.parametrize(
    ("device", "more", "given"),
    [
        ("cuda:0", "", None),
        ("cuda:1", "", "1"),
        ("cuda:1", 'args = ["--device-ids", "1,3"]', "1,3"),
        ("cuda:1", 'env = { CUDA_VISIBLE_DEVICES = "1" }', None),
        ("cpu:0", "", None),
    ],
)
def test_engines_run_on_the_fleets_device(tmp_path: Path, device: str, more: str, given: str | None) -> None:
    text = f'[memory]\nkv_budget = "320MiB"\ndevice = "{device}"\n[[model]]\nname = "a"\npath = "some/hub"\n{more}\n'
    fleet = load_fleet(write(tmp_path, text))
    spec = model_spec(fleet.models[0], fleet, Place(socket=Path("/s"), logs=tmp_path, private=Path("/run/f")))
    assert option(spec.argv, "--device-ids") == given


def test_an_engine_wants_a_key_of_its_own_where_the_fleet_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(key: str, more: str = "") -> tuple[str, str | None]:
        text = f'[memory]\nkv_budget = "320MiB"\ndevice = "cpu:0"\n[[model]]\nname = "a"\npath = "some/hub"\n{more}\n'
        fleet = load_fleet(write(tmp_path, text))
        spec = model_spec(
            fleet.models[0], fleet, Place(socket=Path("/s"), logs=tmp_path, private=tmp_path, engine_key=key)
        )
        return spec.env["VLLM_API_KEY"], option(spec.argv, "--middleware")

    monkeypatch.setenv("VLLM_API_KEY", "the fleet's")
    assert engine("its own") == ("its own", "polder.serve.keys.EngineGuard")
    assert engine("") == ("", None)
    with pytest.raises(ConfigError, match=r"write server\.api_key"):
        engine("", 'env = { VLLM_API_KEY = "x" }')


def test_vllms_own_sockets_lie_in_the_fleets_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(private: str, env: str = "{}") -> str | None:
        text = (
            f'[memory]\nkv_budget = "320MiB"\ndevice = "cpu:0"\n[[model]]\nname = "a"\npath = "some/hub"\nenv = {env}\n'
        )
        fleet = load_fleet(write(tmp_path, text))
        return model_spec(
            fleet.models[0], fleet, Place(socket=Path("/s"), logs=tmp_path, private=Path(private))
        ).env.get("VLLM_RPC_BASE_PATH")

    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    assert folder("/run/f") == "/run/f"
    assert folder("/" + 69 * "f") is not None
    assert folder("/" + 70 * "f") is None, "a socket's path has 107 bytes at most"
    assert folder("/run/f", '{ VLLM_RPC_BASE_PATH = "/mine" }') == "/mine"
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/shells")
    assert folder("/run/f") is None, "the engine gets the shell's"


@pytest.mark.parametrize(
    ("shell", "file", "loaded"),
    [
        (None, None, None),  # vLLM loads all
        ("", None, "polder"),
        ("other", None, "other,polder"),
        ("polder,other", None, "polder,other"),
        ("polder", "other", "other,polder"),
    ],
)
def test_the_plugin_is_loaded_whatever_vllm_plugins_says(
    monkeypatch: pytest.MonkeyPatch, shell: str | None, file: str | None, loaded: str | None
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if shell is not None:
        monkeypatch.setenv("VLLM_PLUGINS", shell)
    model = Model(path="x", settings=EngineSettings(engine="a"), env={} if file is None else {"VLLM_PLUGINS": file})
    assert model.environment(Path("/s")).get("VLLM_PLUGINS") == loaded


def test_an_encoder_has_no_least_kv_memory(tmp_path: Path) -> None:
    path = folder_of(tmp_path, CONFIG | {"model_type": "xlm-roberta", "max_position_embeddings": 512})
    least = least_kv_bytes(path, max_model_len=None, args=[], device="cpu:0", page_bytes=2 * MIB)
    assert least is None


def test_a_reserve_is_a_part_or_a_size(tmp_path: Path, model: Path) -> None:
    text = GOOD.format(model=model).replace("[[", 'reserve_low = "16MiB"\nreserve_high = 0.1\n[[')
    policy = load_fleet(write(tmp_path, text)).policy
    assert (policy.reserve_low_ratio, policy.reserve_high_ratio) == (0.05, 0.1)


def test_a_path_is_relative_to_the_file(tmp_path: Path, model: Path) -> None:
    assert load_fleet(write(tmp_path, GOOD.format(model="model"))).models[0].path == str(model)


def test_what_is_no_path_is_left_to_vllm(tmp_path: Path) -> None:
    only = load_fleet(write(tmp_path, GOOD.format(model="meta-llama/Llama-3.1-8B"))).models[0]
    assert only.path == "meta-llama/Llama-3.1-8B"
    assert only.least_bytes is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("[memory]", "[memory"), "TOML"),
        (('kv_budget = "320MiB"', ""), "kv_budget"),
        (("[memory]", "[mem]"), "mem"),
        (('kv_budget = "320MiB"', 'kv_budget = "320MBit"'), "memory.kv_budget"),
        (('kv_budget = "320MiB"', "kv_budget = 320MiB"), 'write kv_budget = "320MiB"'),
        (('kv_budget = "320MiB"', "kv_budget = 0.9"), 'memory.kv_budget: cannot read 0.9; .* e.g. "64GiB"'),
        (("[memory]", "x = " + "[" * 5000 + "\n[memory]"), "nested too deeply"),
        (("[[model]]", "[model]"), r"write \[\[model\]\] in place of \[model\]"),
        (("max_model_len = 4096", "tensor_parallel_size = 2"), r'args = \["--tensor-parallel-size", "2"\]'),
        (("max_model_len = 4096", "enforce_eager = true"), r'args = \["--enforce-eager"\]'),
        (("max_model_len = 4096", 'weights = "Elastic"'), "write 'resident' or 'elastic'"),
        (("max_model_len = 4096", "tbt_goal = 200"), 'model a: tbt_goal = 200: write the unit too, e.g. "200ms"'),
        (("max_model_len = 4096", "floor = 0"), "model a: floor 0: write a size above 0"),
        (("max_model_len = 4096", "ceiling = 0"), "model a: ceiling 0: write a size above 0"),
        (("max_model_len = 4096", 'max_model_len = 4096\nceiling = "16MiB"'), "ceiling 16 MiB is less .* write 48MiB"),
        (("max_model_len = 4096", 'lend = "10TiB"'), "lend 10 TiB is more than the whole budget of 320 MiB"),
        (('kv_budget = "320MiB"', 'kv_budget = "1MiB"'), "2 MiB"),
        (('device = "cpu:0"', 'devise = "cpu:0"'), "did you mean 'device'"),
        (('device = "cpu:0"', 'device = "gpu"'), "memory.device"),
        (('device = "cpu:0"', 'page = "5KiB"'), "page size 5120"),
        (('name = "a"', 'name = "a b"'), "name 'a b'"),
        (('name = "a"', 'name = "broker"'), "name 'broker'"),
        (('name = "a"', ""), r"model\[0\]: name"),
        (("max_model_len = 4096", 'max_model_len = "long"'), "model a: max_model_len 'long'"),
        (("max_model_len = 4096", "max_model_len = 0"), "model a: max_model_len 0"),
        (("max_model_len = 4096", 'cpus = "one"'), "model a: cpus 'one'"),
        (("max_model_len = 4096", 'cpus = "1-0"'), "model a: cpus '1-0'"),
        (("max_model_len = 4096", 'cpus = "0,9999"'), "9999"),
        (("max_model_len = 4096", "tokens = 1"), "model a: unknown key 'tokens'"),
        (("max_model_len = 4096", 'floor = "x"'), "model a: floor"),
        (('args = ["--block-size", "32"]', 'args = "--port"'), "model a: args"),
        (("max_model_len = 4096", "window_layers = 3"), "model a: window_layers"),
        (("max_model_len = 4096", 'share = "9MiB"\nceiling = "8MiB"'), "share 9 MiB .* ceiling 8 MiB"),
        (("--block-size", "--port"), "model a: args: --port"),
        (("--block-size", "--max-model-len"), "key max_model_len"),
        (("--block-size", "--enable-sleep-mode"), 'args: --enable-sleep-mode: write weights = "elastic"'),
        (("--block-size", "--pipeline-parallel-size"), "args: --pipeline-parallel-size above 1"),
        (("--block-size", "-dp"), r"args: -dp above 1: write one \[\[model\]\] for each replica"),
        (("--block-size", "--kv_offloading_size"), r'--kv-offloading-size: write tiers = \["host"\]'),
        (('"--block-size", "32"', '"--headless"'), "args: --headless: leave it out"),
        (("--block-size", "--api-key"), "args: --api-key: write server.api_key"),
        (("--block-size", "--ssl-keyfile"), "args: --ssl-keyfile: leave it out"),
        (('"--block-size", "32"', '"--max-num-seqs 4"'), r'is one word: write "--max-num-seqs", "4"'),
        (("[memory]", "[server]\nport = 99999\n[memory]"), "server.port 99999"),
        (("[memory]", "[memory]\nreserve_low = 0.9"), "reserve"),
        (("[memory]", '[memory]\nhold = "soon"'), "memory.hold: cannot read 'soon'.*150ms"),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, model: Path, change: tuple[str, str], named: str) -> None:
    path = write(tmp_path, GOOD.format(model=model).replace(*change))
    with pytest.raises(UsageError, match=named) as raised:
        load_fleet(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["--max_model_len", "4096"], "--max-model-len"),
        (["--max_model-len=4096"], "--max-model-len"),
        (["--served_model_name=b"], "--served-model-name"),
        (["--kv_transfer_config.kv_connector", "X"], "--kv-transfer-config"),
        (["--kv-transfer-config.kv_role=kv_both"], "--kv-transfer-config"),
    ],
)
def test_what_the_fleet_sets_is_refused_however_vllm_lets_it_be_written(
    tmp_path: Path, model: Path, args: list[str], option: str
) -> None:
    text = GOOD.format(model=model).replace('args = ["--block-size", "32"]', f"args = {args}")
    with pytest.raises(ConfigError, match=f"model a: args: {option}"):
        load_fleet(write(tmp_path, text))


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--block_size", "16"], "--block-size", "16"),
        (["--block_size=16"], "--block-size", "16"),
        (["--hf_overrides.rope_type", "a_b"], "--hf-overrides", "a_b"),
        (["--dtype=auto_b"], "--dtype", "auto_b"),
        (["-tp", "2"], "-tp", "2"),
        (["-tp=2"], "-tp", "2"),
        (["--block-size-2", "16"], "--block-size", None),
        (["block_size", "16"], "--block-size", None),
    ],
)
def test_an_option_is_found_as_vllm_would_find_it(args: list[str], name: str, value: str | None) -> None:
    assert option(args, name) == value


def test_an_option_at_the_end_needs_a_value() -> None:
    with pytest.raises(ConfigError, match="args: --block-size needs a value"):
        option(["--block_size"], "--block-size")


def test_names_must_differ(tmp_path: Path, model: Path) -> None:
    text = GOOD.format(model=model)
    with pytest.raises(ConfigError, match="'a' is given twice"):
        load_fleet(write(tmp_path, text + text[text.index("[[model]]") :]))


def test_no_model_is_no_fleet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"add a \[\[model\]\]"):
        load_fleet(write(tmp_path, 'model = []\n[memory]\nkv_budget = "1GiB"\n'))


@pytest.mark.parametrize("path", ["models/none", "a/b/c", "~nosuchuser/m"])
def test_a_path_that_is_not_there_is_no_name_on_a_hub(tmp_path: Path, path: str) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match=f"model a: path '?{path}'?: there is no"):
        load_fleet(write(tmp_path, GOOD.format(model=path)))


def test_the_ranks_of_a_model_share_one_device(tmp_path: Path, model: Path) -> None:
    text = GOOD.format(model=model).replace("--block-size", "-tp").replace('"32"', '"2"')
    assert load_fleet(write(tmp_path, text))
    with pytest.raises(ConfigError, match="args: -tp above 1: a fleet file has one device"):
        load_fleet(write(tmp_path, text.replace("cpu:0", "cuda:0")))


def test_a_byte_order_mark_and_other_letters_are_read_whatever_the_locale(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_bytes(b"\xef\xbb\xbf" + f"# für alle\n{GOOD.format(model=model)}".encode())
    assert load_fleet(path)


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path .*nowhere has no config\.json"):
        load_fleet(write(tmp_path, GOOD.format(model=tmp_path / "nowhere")))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        load_fleet(tmp_path / "none.toml")


# ---------------------------------------------------------------- the budget


def test_a_budget_too_small_says_how_much_is_needed(tmp_path: Path, model: Path) -> None:
    text = GOOD.format(model=model)
    second = text[text.index("[[model]]") :].replace('name = "a"', 'name = "b"')
    with pytest.raises(BudgetError, match="96MiB"):
        load_fleet(write(tmp_path, text.replace("320MiB", "64MiB") + second))
    assert load_fleet(write(tmp_path, text.replace("320MiB", "96MiB") + second)), "what it said is enough"


def test_what_no_budget_helps_is_said_before_the_budget(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, CONFIG | {"max_position_embeddings": 4096})
    text = f'[memory]\nkv_budget = "2MiB"\n[[model]]\nname = "chat"\npath = "{folder}"\nmax_model_len = 100000'
    with pytest.raises(ConfigError, match=r"fleet\.toml: model chat: max_model_len 100,000 .* own 4,096: write"):
        load_fleet(write(tmp_path, text))


def test_a_broken_config_is_named_with_its_file_and_its_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    (folder / "config.json").write_text('{"model_type": "lla')
    text = f'[memory]\nkv_budget = "64MiB"\n[[model]]\nname = "chat"\npath = "{folder}"'
    with pytest.raises(
        ConfigError, match=r"fleet\.toml: model chat: cannot read .*config\.json: it is not JSON: .*; fetch"
    ):
        load_fleet(write(tmp_path, text))


def test_a_floor_below_one_request_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(BudgetError, match=r"model a: floor 16 MiB is less than .*write 48MiB or more"):
        load_fleet(write(tmp_path, GOOD.format(model=model) + 'floor = "16MiB"\n'))


def test_shares_over_the_budget_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(BudgetError, match=r"shares are 400 MiB together, more than memory\.kv_budget 320 MiB"):
        load_fleet(write(tmp_path, GOOD.format(model=model) + 'share = "400MiB"\n'))


@pytest.mark.parametrize(
    ("change", "args", "expected"),
    [
        ({}, ("--block-size", "32"), 48 * MIB),
        ({}, ("--block-size=32", "--dtype=float32"), 2 * 80 * MIB // 2),  # 129 blocks in units of 32: 5 x 16 MiB
        ({"dtype": "float32"}, ("--block-size", "32"), 48 * MIB),  # vLLM serves it in half precision
        ({}, (), 48 * MIB),  # CPU blocks of 128 tokens: 33 in units of 16
        ({"num_key_value_heads": None}, ("--block-size", "32"), 80 * MIB),  # no grouping: 8 heads
        ({"head_dim": 128}, ("--block-size", "32"), 80 * MIB),
        ({"kv_lora_rank": 512}, (), None),
        ({"sliding_window": 4096}, (), None),
        ({"sliding_window": 4096, "use_sliding_window": False}, ("--block-size", "32"), 48 * MIB),
        ({"layer_types": ["full_attention", "linear_attention"]}, (), None),
        ({"text_config": {}, "num_hidden_layers": None}, (), None),
        ({"num_key_value_heads": [4, 8]}, (), None),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, (), None),
        ({}, ("--kv-cache-dtype", "fp8"), None),
        ({}, ("--tensor-parallel-size", "2"), None),
        ({}, ("--tensor_parallel_size", "2"), None),
    ],
)
def test_the_least_memory_of_a_model(
    tmp_path: Path, change: dict[str, Any], args: tuple[str, ...], expected: int | None
) -> None:
    folder = folder_of(tmp_path, CONFIG | change)
    least = least_kv_bytes(folder, max_model_len=4096, args=args, device="cpu:0", page_bytes=2 * MIB)
    assert least == expected


def test_without_max_model_len_the_models_own_length_counts(tmp_path: Path) -> None:
    def least(config: dict[str, Any], *args: str) -> int | None:
        folder = folder_of(tmp_path, CONFIG | config)
        return least_kv_bytes(
            folder, max_model_len=None, args=("--block-size", "32", *args), device="cpu:0", page_bytes=2 * MIB
        )

    assert least({}) == 80 * MIB
    assert least({}, "--max-model-len", "4096") == 48 * MIB
    assert least({}, "--max-model-len", "auto") is None
    assert least({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}) == 80 * MIB, "it is scaled already"
    assert least({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}) is None


# ---------------------------------------------------------------- what reaches the engines


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False))
@example(parse_goal("20min", what="goal"))
@example(parse_goal("0.001us", what="goal"))
@example(5e-324)
@example(1.7976931348623157e308)
def test_a_goal_of_any_length_is_the_engines_to_the_last_digit(seconds: float) -> None:
    meant = EngineSettings(engine="a", broker=Path("/s"), tbt_goal_s=parse_goal(seconds, what="goal"))
    settings = read_settings({}, "", meant.environment())
    assert settings is not None
    assert settings.tbt_goal_s == seconds


@given(st.floats(min_value=0, allow_infinity=False, allow_nan=False))
def test_a_time_as_text_is_the_same_time(seconds: float) -> None:
    assert parse_seconds(seconds_text(seconds)) == seconds


@pytest.mark.parametrize("time", ["0.0001us", "1s", "90min"])
def test_the_broker_gets_the_files_times_to_the_last_digit(tmp_path: Path, model: Path, time: str) -> None:
    text = GOOD.format(model=model).replace("[[", f'hold = "{time}"\ndeadline = "{time}"\n[[', 1)
    argv = broker_spec(
        load_fleet(write(tmp_path, text)).broker(Path("/s")), Place(socket=Path("/s"), logs=tmp_path, private=tmp_path)
    ).argv
    for name in ("--hold", "--deadline"):
        assert parse_seconds(argv[argv.index(name) + 1]) == parse_seconds(time)


def test_a_time_longer_than_any_number_is_refused() -> None:
    for text in ("9" * 400 + "s", float("inf"), -1.0):
        with pytest.raises(ConfigError, match="is not a time"):
            parse_seconds(text)
