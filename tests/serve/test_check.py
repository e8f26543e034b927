"""`polder serve --check` never says "enough" while a need is unmet or unknown, and says what to change."""

from __future__ import annotations

import errno
import json
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polder.errors import ConfigError
from polder.planner.checkpoint import checkpoint_bytes, hub_folder
from polder.serve.check import Finding, ask_vllm, check, check_model, faults
from polder.serve.fleet import Model, load_fleet
from polder.serve.listening import listen
from polder.serve.machine import Machine, Memory, host_memory
from polder.serve.process import free_port

GIB = 1 << 30
QWEN = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}
HOST = Memory(total_bytes=512 * GIB, free_bytes=500 * GIB)
H100 = Machine(host=HOST, device=Memory(total_bytes=80 * GIB, free_bytes=int(79.2 * GIB)), vllm="0.32.0")
SMALL = Memory(total_bytes=23 * GIB, free_bytes=20 * GIB)
CPU = Machine(host=SMALL, device=SMALL, vllm="0.32.0+cpu")


def write_weights(path: Path, **tensors: tuple[str, tuple[int, ...], int]) -> None:
    """A file of safetensors without its bytes, of which nobody reads more than the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with two models of 8 billion parameters."""
    for name in ("chat", "code"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(QWEN))
        write_weights(folder / "model.safetensors", all=("BF16", (8_190_000_000,), 16_380_000_000))
    return tmp_path


def findings(
    folder: Path, machine: Machine, memory: str, *tables: str, said: Sequence[str] = (), port: int = 0
) -> dict[str, Finding]:
    def refusals(asked: Sequence[Model]) -> Sequence[str]:
        return [*said, *[""] * (len(asked) - len(said))]

    text = f"[server]\nport = {port or free_port()}\n[memory]\n{memory}\n"
    (folder / "fleet.toml").write_text(text + "".join(f"[[model]]\n{table}\n" for table in tables))
    found = list(check(load_fleet(folder / "fleet.toml"), machine, refusals))
    return {finding.need: finding for finding in found}


CHAT = 'name = "chat"\npath = "chat"'
CODE = 'name = "code"\npath = "code"'


def open_or_unmet(found: dict[str, Finding]) -> dict[str, str]:
    return {need: finding.state for need, finding in found.items() if finding.state != "met"}


def test_enough_is_said_of_a_fleet_whose_needs_are_all_met(models: Path) -> None:
    found = findings(models, H100, 'device = "cuda:0"\nkv_budget = "36GiB"', CHAT, CODE)
    assert not open_or_unmet(found), found
    lines = found["memory of cuda:0"].lines
    assert [line.size_bytes for line in lines if "weights" in line.what] == [16_380_000_000] * 2
    assert found["KV memory of chat"].detail.startswith("5.6")


def test_two_models_and_a_budget_that_leave_no_room_for_activations_and_graphs(models: Path) -> None:
    found = findings(models, H100, 'device = "cuda:0"\nkv_budget = "48GiB"', CHAT, CODE)
    assert open_or_unmet(found) == {"memory of cuda:0": "unmet"}
    said = found["memory of cuda:0"].detail
    lower = int(said.split('to "')[1].split("MiB")[0])
    again = findings(models, H100, f'device = "cuda:0"\nkv_budget = "{lower}MiB"', CHAT, CODE)
    assert not open_or_unmet(again), "what it said is enough"


@pytest.mark.parametrize(
    ("memory", "more", "words"),
    [
        ('device = "cpu:0"\nkv_budget = "90TiB"', "", "needed, 20 GiB free of 23 GiB: "),
        (
            'device = "cpu:0"\nkv_budget = "1GiB"\nhost = "64GiB"',
            '\ntiers = ["host"]',
            "lower memory.host by ",
        ),
        ('device = "cpu:0"\nkv_budget = "20GiB"', "", "end what else takes memory"),
    ],
)
def test_memory_that_the_machine_lacks(tmp_path: Path, memory: str, more: str, words: str) -> None:
    (tmp_path / "chat").mkdir()
    small = QWEN | {"num_hidden_layers": 2, "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 512}
    (tmp_path / "chat" / "config.json").write_text(json.dumps(small))
    write_weights(tmp_path / "chat" / "model.safetensors", all=("F32", (1000,), 4000))
    found = findings(tmp_path, CPU, memory, CHAT + more)
    assert open_or_unmet(found) == {"memory of cpu:0": "unmet"}
    assert words in found["memory of cpu:0"].detail


def test_what_an_estimate_alone_makes_too_little_can_be_waved_through(models: Path) -> None:
    """Two models have 30.5 GiB of weights."""
    for budget, refused in (("46GiB", False), ("60GiB", True)):
        found = findings(models, H100, f'device = "cuda:0"\nkv_budget = "{budget}"', CHAT, CODE)
        (words,) = faults(list(found.values()), "refuse")
        assert ("--memory-check warn" in words) != refused
        assert bool(faults(list(found.values()), "warn")) == refused


def test_a_model_that_is_added_needs_memory_beside_what_the_others_may_still_take(models: Path) -> None:
    text = f'[memory]\ndevice = "cuda:0"\nkv_budget = "30GiB"\n[[model]]\n{CHAT}'
    (models / "fleet.toml").write_text(text)
    fleet = load_fleet(models / "fleet.toml")
    little = Machine(host=HOST, device=Memory(total_bytes=80 * GIB, free_bytes=30 * GIB), vllm="0.32.0")
    for untaken, state in ((5 * GIB, "met"), (20 * GIB, "unmet")):
        found = list(check_model(fleet.models[0], fleet, little, lambda _: [], untaken_bytes=untaken))
        assert found[0].need == "memory of cuda:0"
        assert found[0].state == state, found[0]
    assert not faults(list(check_model(fleet.models[0], fleet, little, lambda _: [], untaken_bytes=None)), "refuse")


def test_weights_of_an_unknown_size_are_no_weights_that_fit(models: Path) -> None:
    (models / "chat" / "model.safetensors").unlink()
    found = findings(models, H100, 'device = "cuda:0"\nkv_budget = "8GiB"', CHAT)
    assert found["memory of cuda:0"].detail.endswith("unknown: chat: weights")
    assert open_or_unmet(found) == {"memory of cuda:0": "open"}


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"sliding_window": 4096}, "met"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}, "met"),
        ({"num_experts": 64, "num_experts_per_tok": 4}, "met"),
        ({"mamba_expand": 2}, "open"),
    ],
)
def test_kv_memory_of_other_kinds_of_attention_has_a_bound_or_is_open(
    models: Path, changes: dict[str, Any], state: str
) -> None:
    (models / "chat" / "config.json").write_text(json.dumps(QWEN | changes))
    found = findings(models, H100, 'device = "cuda:0"\nkv_budget = "24GiB"', CHAT)
    assert found["KV memory of chat"].state == state


def test_elastic_weights_have_a_copy_in_host_memory(models: Path) -> None:
    elastic = '\nweights = "elastic"'
    found = findings(models, H100, 'device = "cuda:0"\nbudget = "40GiB"', CHAT + elastic, CODE + elastic)
    assert not open_or_unmet(found)
    little = Machine(host=SMALL, device=H100.device, vllm="0.32.0")
    found = findings(models, little, 'device = "cuda:0"\nbudget = "40GiB"', CHAT + elastic, CODE + elastic)
    assert open_or_unmet(found) == {"memory of the host": "unmet"}


def test_a_device_that_is_not_there(models: Path) -> None:
    without = Machine(host=HOST, device=None, fault="there is no NVIDIA driver here", vllm="0.32.0")
    found = findings(models, without, 'device = "cuda:0"\nkv_budget = "8GiB"', CHAT)
    assert found["device"].state == "unmet"
    assert "no NVIDIA driver" in found["device"].detail


def test_a_port_that_is_taken_and_a_host_of_another_machine(models: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        found = findings(models, H100, 'device = "cuda:0"\nkv_budget = "8GiB"', CHAT, port=port)
    assert open_or_unmet(found) == {"port": "unmet"}
    assert "choose another server.port" in found["port"].detail


def test_a_host_of_another_machine_and_a_port_of_the_administrator_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no address of this machine: write 127\.0\.0\.1"):
        listen("192.0.2.1", 8000)
    with pytest.raises(ConfigError, match="write an address of this machine"):
        listen("nosuch.invalid", 8000)

    class Listener(socket.socket):
        def bind(self, _: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Listener)
    with pytest.raises(ConfigError, match="may not listen there: write a port above 1023"):
        listen("127.0.0.1", 80)


@pytest.mark.parametrize(("version", "words"), [(None, "polder-kv[serve,gpu]"), ("0.31.0", "vLLM 0.31.0 is installed")])
def test_a_vllm_that_is_missing_or_untested(models: Path, version: str | None, words: str) -> None:
    machine = Machine(host=HOST, device=H100.device, vllm=version)
    found = findings(models, machine, 'device = "cuda:0"\nkv_budget = "8GiB"', CHAT)
    assert open_or_unmet(found) == {"vLLM": "unmet"}
    assert words in found["vLLM"].detail


def test_arguments_that_vllm_refuses_are_named_with_their_model(models: Path) -> None:
    with_arguments = '\nargs = ["--enforce-eagr"]'
    found = findings(
        models,
        H100,
        'device = "cuda:0"\nkv_budget = "16GiB"',
        CHAT,
        CODE + with_arguments,
        said=["unrecognized arguments"],
    )
    assert open_or_unmet(found) == {"arguments of code": "unmet"}
    assert "unrecognized arguments" in found["arguments of code"].detail


def test_vllm_that_cannot_be_asked_leaves_its_arguments_open(models: Path) -> None:
    def refusals(asked: Sequence[Model]) -> Sequence[str]:
        raise ConfigError("vLLM's parser could not be asked: a reason")

    text = f'[server]\nport = {free_port()}\n[memory]\ndevice = "cuda:0"\nkv_budget = "8GiB"\n[[model]]\n{CHAT}\nargs = ["-x"]'
    (models / "fleet.toml").write_text(text)
    found = {finding.need: finding for finding in check(load_fleet(models / "fleet.toml"), H100, refusals)}
    assert open_or_unmet(found) == {"arguments": "open"}


def test_a_context_longer_than_the_models_own(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 'device = "cuda:0"\nkv_budget = "16GiB"'
    with pytest.raises(
        ConfigError, match="model chat: max_model_len 65,536 is more than the model's own 40,960: write"
    ):
        findings(models, H100, memory, f"{CHAT}\nmax_model_len = 65536")
    allowed = f'{CHAT}\nmax_model_len = 65536\nenv = {{ VLLM_ALLOW_LONG_MAX_MODEL_LEN = "1" }}'
    assert not open_or_unmet(findings(models, H100, memory, allowed))


def test_a_name_on_a_hub_is_open_until_it_is_fetched(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(models / "hub"))
    table = 'name = "chat"\npath = "Qwen/Qwen3-8B"'
    found = findings(models, H100, 'device = "cuda:0"\nkv_budget = "16GiB"', table)
    assert found["model chat"].state == "open"
    assert "hf download Qwen/Qwen3-8B" in found["model chat"].detail
    cache = models / "hub" / "models--Qwen--Qwen3-8B"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots").mkdir()
    (models / "code").rename(cache / "snapshots" / "abc")
    assert hub_folder("Qwen/Qwen3-8B") == cache / "snapshots" / "abc"
    assert not open_or_unmet(findings(models, H100, 'device = "cuda:0"\nkv_budget = "16GiB"', table))


def test_disks_without_room_and_two_directories_on_one_disk(models: Path) -> None:
    for name in ("nvme0", "nvme1"):
        (models / name).mkdir()
    tiers = '\ntiers = ["host", "disk"]'

    def disks(*sizes: str) -> Finding:
        given = [f"{models}/nvme{number}:{size}" for number, size in enumerate(sizes)]
        memory = f'device = "cuda:0"\nkv_budget = "8GiB"\nhost = "1GiB"\ndisks = {given}'
        return findings(models, H100, memory, CHAT + tiers)["disks"]

    assert disks("1GiB").state == "met"
    assert disks("400TiB").state == "unmet"
    assert "lower the limit to" in disks("400TiB").detail
    assert disks("1GiB", "1GiB").state == "open"
    assert "on one disk" in disks("1GiB", "1GiB").detail


# ---------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/app/one\n", {"app/memory.max": 4 * GIB, "app/memory.current": 3 * GIB, "app/one/memory.max": "max"}),
        ("0::/\n", {"memory.max": 4 * GIB, "memory.current": 3 * GIB}),
        (
            "5:cpu:/x\n4:memory:/docker/1\n",
            {"memory/docker/1/memory.limit_in_bytes": 4 * GIB, "memory/docker/1/memory.usage_in_bytes": 3 * GIB},
        ),
    ],
)
def test_a_container_has_what_its_control_group_leaves(tmp_path: Path, group: str, files: dict[str, Any]) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(group)
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {48 << 20} kB\n")
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        (path.parent / "memory.stat").write_text(f"inactive_file {GIB}\ntotal_inactive_file {GIB}\n")
    found = host_memory(tmp_path, tmp_path / "fs")
    assert (found.total_bytes, found.free_bytes) == (4 * GIB, 2 * GIB)
    assert "cgroup" in found.limit


def test_this_machine_tells_its_memory() -> None:
    found = host_memory()
    assert 0 < found.free_bytes <= found.total_bytes


# ---------------------------------------------------------------- checkpoints


def test_weights_are_counted_as_they_are_loaded(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", w=("F32", (10, 10), 400), q=("F8_E4M3", (7,), 7))
    assert checkpoint_bytes(tmp_path, 2) == 207
    assert checkpoint_bytes(tmp_path, 4) == 407
    write_weights(tmp_path / "other.safetensors", w=("F32", (10, 10), 400))
    index = {"weight_map": {"w": "a.safetensors", "q": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_bytes(tmp_path, 2) == 207, "the index names what is loaded"


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, struct.pack("<Q", 2) + b"[]"])
def test_a_file_that_is_no_checkpoint_has_no_size(tmp_path: Path, content: bytes) -> None:
    assert checkpoint_bytes(tmp_path, 2) is None
    (tmp_path / "a.safetensors").write_bytes(content)
    assert checkpoint_bytes(tmp_path, 2) is None


def test_what_asks_vllm_takes_no_module_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert ask_vllm([]) == []
