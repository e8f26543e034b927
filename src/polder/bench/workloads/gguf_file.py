"""Reads a GGUF file and makes an ordinary checkpoint of it, for the two architectures that the demo and the tests use.

transformers can load GGUF files, too, but it needs another package for that and reads the header of a vocabulary of
262,144 tokens three times, in half a minute of CPU time. Here it is read once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Gguf", "save_checkpoint"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Gguf:
    """One file: `fields` has its metadata (arrays of strings left out), `tensors` its weights."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when it is no GGUF file of version 2 or 3."""
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r").data
        self._at = 0
        magic, version, tensors, fields = self._take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._take("I")[0])
        self._tensors = [self._tensor() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        self._data = -(-self._at // alignment) * alignment

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and dequantised weights (float32) of each tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        for tensor in self._tensors:
            kind = GGMLQuantizationType(tensor.kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            rows = (*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
            start = self._data + tensor.offset
            raw = np.frombuffer(self._bytes[start : start + prod(rows)], dtype=np.uint8).reshape(rows)
            if kind == GGMLQuantizationType.F32:
                raw = raw.view(np.float32)
            yield tensor.name, torch.from_numpy(np.array(dequantize(raw, kind))).view(tensor.shape)

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _string(self) -> str:
        (length,) = self._take("Q")
        self._at += length
        return bytes(self._bytes[self._at - length : self._at]).decode()

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        of, count = self._take("IQ")
        if of in _SCALARS:
            return self._take(f"{count}{_SCALARS[of]}")
        for _ in range(count):  # vocabulary and merges: the tokenizer's loader reads those
            (length,) = self._take("Q")
            self._at += length
        return None

    def _tensor(self) -> _Tensor:
        name = self._string()
        (dimensions,) = self._take("I")
        shape = self._take(f"{dimensions}Q")  # fastest first
        kind, offset = self._take("IQ")
        return _Tensor(name=name, shape=tuple(reversed(shape)), kind=kind, offset=offset)


def save_checkpoint(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes config, weights in `dtype` and tokenizer. Raises ValueError for another architecture or other tensors than
    it has."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    file = Gguf(path)
    kind = file.fields["general.architecture"]
    if kind not in ("llama", "gemma3"):
        raise ValueError(f"{path} has a model of the architecture {kind}")
    config = (_llama_config if kind == "llama" else _gemma3_config)(file)
    model_class = transformers.LlamaForCausalLM if kind == "llama" else transformers.Gemma3ForCausalLM
    with torch.device("meta"):
        model = model_class(config)
    weights = dict(_renamed(file, config))
    missing, unknown = model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in weights.items()}, strict=False, assign=True
    )
    if unknown or [name for name in missing if name != "lm_head.weight"]:
        raise ValueError(f"{path} lacks {missing}, or has {unknown}")
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer_class = transformers.PreTrainedTokenizerFast if kind == "llama" else transformers.GemmaTokenizer
    tokenizer = tokenizer_class.from_pretrained(path.parent, gguf_file=path.name)
    if file.fields.get("tokenizer.ggml.add_bos_token"):
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)


def _shape(file: Gguf) -> dict[str, Any]:
    prefix = file.fields["general.architecture"]
    fields = {name.removeprefix(f"{prefix}."): value for name, value in file.fields.items()}
    return {
        "vocab_size": next(tensor.shape[0] for tensor in file._tensors if tensor.name == "token_embd.weight"),
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "head_dim": fields.get("attention.key_length", fields["embedding_length"] // fields["attention.head_count"]),
        "rms_norm_eps": fields["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": fields["context_length"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in file._tensors),
    }


def _llama_config(file: Gguf) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": file.fields["llama.rope.freq_base"]}
    return LlamaConfig(**_shape(file), rope_parameters=rope)


def _gemma3_config(file: Gguf) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**_shape(file), sliding_window=file.fields["gemma3.attention.sliding_window"])


_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _renamed(file: Gguf, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as transformers names and stores them."""
    gemma = config.model_type == "gemma3_text"
    norms = {"ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    inside = _INSIDE | (norms if gemma else {"ffn_norm": "post_attention_layernorm"})
    for name, tensor in file.tensors():
        weight = tensor
        if gemma and name.endswith("norm.weight"):
            weight = tensor - 1  # llama.cpp stores what Gemma multiplies by, 1 + w
        if name in _OUTSIDE:
            yield _OUTSIDE[name], weight
            continue
        _, layer, part, _ = name.split(".")
        if not gemma and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            # llama.cpp stores pairs that rotate together side by side, transformers half a head apart.
            weight = tensor.view(heads, -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        yield f"model.layers.{layer}.{inside[part]}.weight", weight
