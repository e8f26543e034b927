"""How far a way to decode is from dense: the same tokens are forced in all arms, and the logits compared."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Decoded", "DecodingEngine", "VllmEngine", "quality"]

Floats = npt.NDArray[np.float32]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, kw_only=True)
class Decoded:
    logits: Floats
    """[tokens, vocabulary]; the first are the prompt's own, which is dense in all arms."""
    tokens: list[int]
    said: Mapping[str, Any]
    """What the answer says about how it was made; empty: dense."""
    token_ms: float
    """Median of the steps."""


class DecodingEngine(Protocol):
    block_tokens: int
    block_bytes: int
    """Of KV, in all layers."""
    layers: int

    def tokenize(self, text: str) -> list[int]: ...

    def decode(self, prompt: list[int], tokens: int, forced: list[int] | None, ask: Mapping[str, Any]) -> Decoded:
        """`ask`: what a request writes for sparse reading; empty: nothing."""

    def stop(self) -> None: ...


class VllmEngine:
    """vLLM with Polder, offline. One request at a time."""

    def __init__(
        self, model: Path, settings: Mapping[str, str], folder: Path, *, block_tokens: int, longest: int
    ) -> None:
        with _environment({**ENVIRONMENT, **settings}):
            from vllm import LLM

            self._llm = LLM(
                model=str(model),
                dtype="float32",
                max_model_len=longest,
                block_size=block_tokens,
                max_num_batched_tokens=512,
                enforce_eager=True,
                logits_processors=["polder.bench.stages.forced:ForcedTokens"],
            )
        config = self._llm.llm_engine.vllm_config.model_config.hf_config
        self.block_tokens, self.layers = block_tokens, int(config.num_hidden_layers)
        d = config.hidden_size // config.num_attention_heads
        self.block_bytes = block_tokens * self.layers * 2 * 4 * config.num_key_value_heads * d
        self._file, self._number = folder / "logits", 0

    def tokenize(self, text: str) -> list[int]:
        return list(self._llm.get_tokenizer()(text, add_special_tokens=False).input_ids)

    def decode(self, prompt: list[int], tokens: int, forced: list[int] | None, ask: Mapping[str, Any]) -> Decoded:
        from vllm import SamplingParams

        extra: dict[str, Any] = {"polder_forced": {"file": str(self._file), "tokens": forced}}
        if ask:
            extra["kv_transfer_params"] = {"polder": dict(ask)}
        parameters = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra
        )
        engine, times = self._llm.llm_engine, []
        self._number += 1
        engine.add_request(f"bench-{self._number}", {"prompt_token_ids": prompt}, parameters)
        found: Any = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                times.append(time.monotonic())
                found = output
        logits = np.fromfile(self._file, np.float32).reshape(tokens, -1)
        self._file.unlink()
        said = (found.kv_transfer_params or {}).get("polder", {})
        steps = np.diff(times)[1:]
        return Decoded(
            logits=logits,
            tokens=list(found.outputs[0].token_ids),
            said=said,
            token_ms=1000 * median(steps.tolist()) if len(steps) else 0.0,
        )

    def stop(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def quality(found: Decoded, dense: Decoded, expected: list[int]) -> dict[str, float]:
    """Of the tokens after the first: KL to dense, how often the most likely token is dense's and the text's own, and the
    perplexity of the text."""
    of, to = _log_softmax(found.logits[1:]), _log_softmax(dense.logits[1:])
    text = np.array(expected[1 : len(of) + 1])
    return {
        "kl_to_dense": float((np.exp(to) * (to - of)).sum(axis=1).mean()),
        "top1_agreement": float((of.argmax(axis=1) == to.argmax(axis=1)).mean()),
        "perplexity": float(np.exp(-of[np.arange(len(text)), text].mean())),
        "exact_match": float((of.argmax(axis=1) == text).mean()),
    }


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    found = logits.astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
    return found


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
