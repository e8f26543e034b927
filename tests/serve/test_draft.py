"""`polder init` writes a file that `polder serve --check` finds enough where the machine has the memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from polder.errors import BudgetError, ConfigError
from polder.serve.check import check
from polder.serve.draft import draft, read_command, with_own_cores
from polder.serve.fleet import load_fleet
from polder.serve.machine import Machine, Memory, physical_cores
from polder.serve.process import free_port
from tests.serve.test_check import CPU, GIB, H100, HOST, models, open_or_unmet
from tests.serve.test_cli import polder

__all__ = ["models"]

BIND = "VLLM_CPU_OMP_THREADS_BIND"


def checked(folder: Path, text: str, machine: Machine) -> dict[str, str]:
    (folder / "fleet.toml").write_text(text)
    found = check(load_fleet(folder / "fleet.toml"), machine, lambda asked: [""] * len(asked))
    return open_or_unmet({finding.need: finding for finding in found})


def test_a_command_line_becomes_a_model(models: Path) -> None:
    found = read_command(
        f'CUDA_VISIBLE_DEVICES=0 vllm serve {models}/chat --served-model-name "my chat" --max_model_len=8192 '
        "--port 8001 --gpu-memory-utilization 0.4 --enforce-eager --max-num-seqs 4"
    )
    assert (found.name, found.path, found.max_model_len) == ("my-chat", f"{models}/chat", 8192)
    assert found.args == ("--enforce-eager", "--max-num-seqs", "4")
    assert found.env == {"CUDA_VISIBLE_DEVICES": "0"}
    assert found.left_out == ("--port 8001", "--gpu-memory-utilization 0.4")


def test_on_a_cpu_no_two_models_compute_on_one_core(models: Path) -> None:
    given = [read_command(f"{models}/{name}") for name in ("chat", "code")]
    usable = sorted(os.sched_getaffinity(0))[:2]
    many = Memory(total_bytes=256 * GIB, free_bytes=200 * GIB)
    cores = tuple((core,) for core in usable)
    machine = Machine(host=many, device=many, vllm="0.32.0+cpu", cores=cores)
    (models / "fleet.toml").write_text(draft(given, machine, "cpu:0", free_port()))
    bound = [(model.cpus, model.env.get(BIND, "")) for model in load_fleet(models / "fleet.toml").models]
    own = [(str(core), str(core)) for core in usable]
    assert bound == (own if len(own) == 2 else [("", "")] * 2)


def test_threads_of_one_core_stay_with_one_model_and_a_command_keeps_its_own_binding(models: Path) -> None:
    given = [read_command(f"{models}/{name}") for name in ("chat", "code")]
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    assert [(model.cpus, model.env) for model in with_own_cores(given, pairs)] == [
        ("0,1,4,5", {BIND: "0,1"}),
        ("2,3,6,7", {BIND: "2,3"}),
    ]
    assert with_own_cores(given, pairs[:1]) == given, "too few cores"
    bound = [*given[:1], read_command(f"{BIND}=3 vllm serve {models}/code")]
    assert with_own_cores(bound, pairs) == bound


def test_logical_cores_are_told_by_their_physical_one(tmp_path: Path) -> None:
    for core in range(4):
        (tmp_path / f"cpu{core}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(f"{core % 2},{core % 2 + 2}\n")
    assert physical_cores({0, 1, 2, 3, 9}, tmp_path) == ((0, 2), (1, 3), (9,))


@pytest.mark.parametrize("text", ["vllm bench x", "vllm serve --port 1", "vllm serve 'x", "vllm serve x --port"])
def test_another_command_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write|quote|needs a value"):
        read_command(text)


def test_what_was_written_is_enough_for_the_check(models: Path) -> None:
    given = [read_command(f"{models}/chat"), read_command(f"vllm serve {models}/code --enforce-eager")]
    text = draft(given, H100, "cuda:0", free_port())
    assert checked(models, text, H100) == {}
    fleet = load_fleet(models / "fleet.toml")
    assert fleet.budget_bytes > 36 * GIB
    assert "15.26 GiB  chat: weights\n" in text


def test_contexts_are_shortened_until_one_request_of_each_fits(models: Path) -> None:
    given = [read_command(f"{models}/{name}") for name in ("chat", "code")]
    small = Machine(host=HOST, device=Memory(total_bytes=48 * GIB, free_bytes=45 * GIB), vllm="0.32.0")
    assert checked(models, draft(given, small, "cuda:0", free_port()), small) == {}
    lengths = [model.max_model_len for model in load_fleet(models / "fleet.toml").models]
    assert min(length or 40960 for length in lengths) < 40960


def test_weights_that_do_not_fit_together_are_elastic(models: Path) -> None:
    given = [read_command(f"{models}/{name}") for name in ("chat", "code")]
    small = Machine(host=HOST, device=Memory(total_bytes=32 * GIB, free_bytes=31 * GIB), vllm="0.32.0")
    text = draft(given, small, "cuda:0", free_port())
    assert text.count('weights = "elastic"') == 2
    assert checked(models, text, small) == {}


def test_models_that_never_fit_are_refused_with_sizes(models: Path) -> None:
    tiny = Machine(host=HOST, device=Memory(total_bytes=16 * GIB, free_bytes=15 * GIB), vllm="0.32.0")
    with pytest.raises(BudgetError, match="15 GiB are free"):
        draft([read_command(f"{models}/chat")], tiny, "cuda:0", 8000)
    with pytest.raises(ConfigError, match="no NVIDIA driver"):
        draft([], Machine(host=HOST, device=None, fault="no NVIDIA driver", vllm=None), "cuda:0", 8000)


def test_two_of_one_name_get_numbers(models: Path) -> None:
    text = draft([read_command(f"{models}/chat")] * 2, H100, "cuda:0", free_port())
    assert 'name = "chat"' in text
    assert 'name = "chat-2"' in text


def test_init_writes_a_file_once(models: Path) -> None:
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 64}
    config = {**small, "vocab_size": 100, "max_position_embeddings": 2048, "dtype": "bfloat16"}
    (models / "chat" / "config.json").write_text(json.dumps(config))
    (models / "chat" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    out = models / "new.toml"
    arguments = ("init", str(models / "chat"), "--device", "cpu:0", "--out", str(out), "--port", str(free_port()))
    done = polder(*arguments)
    assert done.returncode == 0, done.stderr
    assert checked(models, out.read_text(), CPU) in ({}, {"memory of cpu:0": "unmet"})
    assert "exists: remove it" in polder(*arguments).stderr
