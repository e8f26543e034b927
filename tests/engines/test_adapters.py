"""What the engine was made to forget comes back from no tier: adapters that are loaded again, and prefix caches that are reset."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.core import EngineCoreProc

from polder.engines.vllm import plugin
from polder.engines.vllm.core import taps
from polder.engines.vllm.hooks import around
from polder.engines.vllm.tiers.adapters import AdapterEpochs
from tests.engines.harness import A32, ORDINARY, PAGE, Engine, prompts, wait_for

RANK = 8
PROMPT = prompts(1, 200, seed=51)[0]


def write_adapter(folder: Path, seed: int) -> None:
    """A LoRA adapter of random weights for keys and values of A, over whatever is there."""
    folder.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(A32.layers):
        for name in ("k_proj", "v_proj"):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(RANK, A32.hidden, generator=draw) * 0.3
            weights[f"{key}.lora_B.weight"] = torch.randn(A32.kv_heads * A32.head_dim, RANK, generator=draw) * 0.3
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["k_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def request(adapter: LoRARequest | None) -> Any:
    return SimpleNamespace(lora_request=adapter)


def test_an_adapter_has_other_hashes_only_when_it_is_loaded_again_from_changed_files(tmp_path: Path) -> None:
    stock = kv_cache_utils._gen_lora_extra_hash_keys
    epochs = AdapterEpochs()
    keys = around(stock, epochs.hash_keys)
    write_adapter(tmp_path / "a", 1)
    adapter = LoRARequest("a", 1, str(tmp_path / "a"))
    plain = stock(request(adapter))
    assert keys(request(None)) == []
    assert keys(request(adapter)) == plain
    epochs.loaded(adapter)
    assert keys(request(adapter)) == plain, "loaded again, and nothing has changed"
    write_adapter(tmp_path / "a", 2)
    assert keys(request(adapter)) == plain, "the workers still have the former weights"
    epochs.loaded(adapter)
    second = keys(request(adapter))
    assert second != plain
    write_adapter(tmp_path / "a", 1)
    in_place = LoRARequest("a", 1, str(tmp_path / "a"), load_inplace=True)
    assert keys(request(in_place)) not in (plain, second), (
        "former weights that come back are not taken for what they were"
    )
    assert keys(request(adapter)) == keys(request(in_place))
    elsewhere = LoRARequest("b", 2, "some/hub-name")
    assert keys(request(elsewhere)) == stock(request(elsewhere))
    epochs.loaded(elsewhere)
    assert keys(request(elsewhere)) != stock(request(elsewhere)), "nobody knows what the hub has now"


def patch(core: Any) -> None:
    core.reset_prefix_cache = around(core.reset_prefix_cache, taps.reset_prefix_cache)
    core.add_lora = around(core.add_lora, taps.add_lora)
    core.polder_forget_local = taps.polder_forget_local


@pytest.mark.parametrize(
    ("connector", "works", "told"), [(False, True, True), (False, False, False), (True, True, False)]
)
def test_tiers_forget_when_a_user_resets_the_prefix_cache(connector: bool, works: bool, told: bool) -> None:
    """With `reset_connector` vLLM does it; a reset that fails, for blocks are in use, is tried again by who asked for it."""
    calls: list[str] = []

    class Core:
        scheduler = SimpleNamespace(reset_connector_cache=lambda: calls.append("reset") or True)
        polder = SimpleNamespace(
            on_reset=lambda: calls.append("subsystems"),
            tiers=SimpleNamespace(seal_disks=lambda: calls.append("seal")),
        )

        def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
            return works

        def add_lora(self, lora_request: Any) -> bool:
            return True

    patch(Core)
    assert Core().reset_prefix_cache(False, connector) == works
    expected = ["subsystems"] * works + ["reset", "seal"] * told
    assert calls == expected
    assert Core().polder_forget_local() == works  # type: ignore[attr-defined]
    assert calls == expected, "only users make tiers forget"


def test_an_adapter_is_noted_when_vllm_has_loaded_it() -> None:
    noted: list[str] = []

    class Core:
        def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
            return True

        def add_lora(self, lora_request: Any) -> bool:
            return bool(lora_request != "broken")

    patch(Core)
    core: Any = Core()
    assert core.add_lora("before there are tiers")
    core.polder_adapters = SimpleNamespace(loaded=noted.append)
    assert core.add_lora("a")
    assert not core.add_lora("broken")
    assert noted == ["a"]


def test_vllm_still_decodes_what_its_front_end_sends(tmp_path: Path) -> None:
    """It looks at the annotations of the method that is called."""
    plugin.register()
    sent = msgspec.to_builtins(LoRARequest("a", 1, str(tmp_path)))
    core = EngineCoreProc.__new__(EngineCoreProc)
    (decoded,) = EngineCoreProc._convert_msgspec_args(core.add_lora, (sent,))
    assert isinstance(decoded, LoRARequest)


@pytest.mark.engine
def test_an_adapter_retrained_in_place_and_a_reset_leave_nothing_of_the_former_weights(tmp_path: Path) -> None:
    from vllm import SamplingParams

    write_adapter(tmp_path / "here", 1)
    write_adapter(tmp_path / "there", 2)
    settings = {
        "POLDER_KV_BUDGET": "80MiB",
        "POLDER_PAGE": "256KiB",
        "POLDER_TIERS": "host",
        "POLDER_HOST": f"{160 * PAGE}B",
    }
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    engine = Engine.start("lora", A32, settings, like=ORDINARY, **options)
    parameters = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, detokenize=False)

    def ask(adapter: LoRARequest) -> list[int]:
        """Twice, so that the tier has what the first one wrote; the second time from the tier."""
        for _ in range(2):
            (answer,) = engine.llm.generate(
                [{"prompt_token_ids": PROMPT}], parameters, lora_request=adapter, use_tqdm=False
            )
            wait_for(lambda: bool(engine.utility("polder_forget_local")), "no block to be in use")
        return list(answer.outputs[0].token_ids)

    def hits() -> float:
        found: dict[str, float] = engine.utility("polder_check")
        return found["tier_host_hit_tokens_total"]

    try:
        here, there = LoRARequest("x", 1, str(tmp_path / "here")), LoRARequest("y", 2, str(tmp_path / "there"))
        first, second = ask(here), ask(there)
        assert first != second, "the adapters do not differ enough for this test"
        assert hits() > 0
        write_adapter(tmp_path / "here", 2)
        engine.llm.llm_engine.add_lora(LoRARequest("x", 1, str(tmp_path / "here"), load_inplace=True))
        before = hits()
        assert ask(here) == second
        assert hits() > before, "the tier serves the new weights"
        assert engine.llm.llm_engine.reset_prefix_cache()
        assert engine.utility("polder_check")["tier_host_used_bytes"] == 0
        before = hits()
        engine.llm.generate([{"prompt_token_ids": PROMPT}], parameters, lora_request=here, use_tqdm=False)
        assert hits() == before
    finally:
        engine.stop()
