"""Small models with random weights, made on the spot and always the same.

Random weights are enough here: a bench measures memory, time and equality of tokens, never quality. Two families, so
that the two engines share no shape by chance: A is a Llama of 8 layers (8 KiB of KV per token in bf16, the model of
the reference measurements), B a Qwen3 of 4 layers (4 KiB).

The tokenizer has one word per id, `t<i>`, so text and token ids map to each other exactly.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from polder.memory.page import PAGE_BYTES

__all__ = ["MODEL_A", "MODEL_B", "RESERVED_IDS", "ModelRecipe", "ensure_model", "layer_bytes", "weights_bytes"]

RESERVED_IDS = 3
"""Ids 0, 1, 2 are `<unk>`, `<s>` and `</s>`; prompts never hold them."""

_FINGERPRINT_FILE = "recipe.json"
_RECIPE_VERSION = 2  # raise when the way of building changes, so that cached models are made again
_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Everything that decides the bytes of a model folder."""

    name: str
    family: Literal["llama", "qwen3", "gemma3", "qwen2_moe"]
    layers: int
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 32_000
    max_positions: int = 8192
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    spread: float = 0.02
    """Standard deviation of the weights."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _DTYPE_BYTES[self.dtype]

    def describe(self) -> str:
        """One line for the conditions of a result."""
        kv = f"{self.kv_bytes_per_token} B of KV per token, {self.dtype}"
        return f"{self.name}: {self.family}, {self.layers} layers, {kv}"

    @property
    def fingerprint(self) -> str:
        """Short hash of the recipe; names the folder."""
        text = json.dumps({"version": _RECIPE_VERSION, **asdict(self)}, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]

    def in_float32(self) -> ModelRecipe:
        """The same model with float32 weights and KV: exact enough that batch shapes do not change greedy tokens."""
        return replace(self, name=f"{self.name}-f32", dtype="float32")


MODEL_A = ModelRecipe(name="tiny-llama", family="llama", layers=8, seed=1)
"""56 M parameters, 8 KiB of KV per token: the long-context model that wants memory."""

MODEL_B = ModelRecipe(name="tiny-qwen", family="qwen3", layers=4, seed=2)
"""4 layers, 4 KiB of KV per token: the model that bursts and is idle in between."""


def layer_bytes(recipe: ModelRecipe) -> int:
    """Bytes of the parameters of one decoder layer of a Llama or Qwen3."""
    queries, keys = recipe.heads * recipe.head_dim, recipe.kv_heads * recipe.head_dim
    attention = recipe.hidden * (2 * queries + 2 * keys)
    norms = 2 * recipe.hidden + (2 * recipe.head_dim if recipe.family == "qwen3" else 0)
    return (attention + 3 * recipe.hidden * recipe.intermediate + norms) * _DTYPE_BYTES[recipe.dtype]


def weights_bytes(recipe: ModelRecipe) -> int:
    """Bytes of the pages under all decoder layers, each layer in whole pages."""
    return recipe.layers * -(-layer_bytes(recipe) // PAGE_BYTES) * PAGE_BYTES


def ensure_model(recipe: ModelRecipe, directory: Path) -> Path:
    """Returns the model's folder under `directory`, building it if the one there has another recipe or is not whole.

    One process builds at a time.
    """
    folder = directory / f"{recipe.name}-{recipe.fingerprint}"
    if not (folder / _FINGERPRINT_FILE).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / _FINGERPRINT_FILE).is_file():
                _build(recipe, folder)
    return folder


def _build(recipe: ModelRecipe, folder: Path) -> None:
    # Built beside its place and moved there: an interrupted build leaves nothing that looks finished.
    draft = Path(mkdtemp(prefix=f".{recipe.name}-", dir=folder.parent))
    try:
        _save_weights(recipe, draft)
        _save_tokenizer(recipe, draft)
        (draft / _FINGERPRINT_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save_weights(recipe: ModelRecipe, folder: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    shape: dict[str, Any] = {
        "num_hidden_layers": recipe.layers,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "vocab_size": recipe.vocab,
        "max_position_embeddings": recipe.max_positions,
        "tie_word_embeddings": False,  # tied random weights only repeat their input
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": recipe.spread,
        "dtype": recipe.dtype,
    }
    families = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    }
    if recipe.family == "qwen2_moe":  # experts, one shared by all tokens, and biases in attention
        del shape["head_dim"]
        expert = recipe.intermediate // 4
        shape |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": expert}
        shape |= {"shared_expert_intermediate_size": expert, "qkv_bias": True}
    if recipe.family == "gemma3":  # a hybrid: every third layer attends to everything, the others to a window
        shape["sliding_window"] = 64
        # Queries and keys are normalised, so without it attention over random ones is a mean, and all contexts look the same.
        shape["query_pre_attn_scalar"] = 4
        shape["layer_types"] = [
            "full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(recipe.layers)
        ]
    config_class, model_class = families[recipe.family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = model_class(config_class(**shape)).to(getattr(torch, recipe.dtype))
    model.save_pretrained(folder, safe_serialization=True)


def _save_tokenizer(recipe: ModelRecipe, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(RESERVED_IDS, recipe.vocab)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=recipe.max_positions,
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(folder)
