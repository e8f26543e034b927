"""Decoding by given tokens, in the engine's own process: vLLM loads this module as a logits processor.

All arms are asked for the next token at the same places, whatever they would have answered before, and all logits are
kept. A request says so by its `extra_args`: {"polder_forced": {"file": path, "tokens": [...]}}; without tokens it decodes
freely.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

__all__ = ["ForcedTokens"]


class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]
    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        told = (params.extra_args or {}).get("polder_forced")
        return None if told is None else _Request(Path(told["file"]), told.get("tokens"))


class _Request:
    def __init__(self, file: Path, tokens: list[int] | None) -> None:
        self._file, self._tokens, self._step = file, tokens, 0
        file.write_bytes(b"")

    def __call__(self, output: list[int], logits: Any) -> Any:
        """`logits`: [vocabulary]"""
        with self._file.open("ab") as file:
            file.write(logits.float().cpu().numpy().tobytes())
        if self._tokens is not None and self._step < len(self._tokens):
            logits.fill_(-float("inf"))
            logits[self._tokens[self._step]] = 0.0
        self._step += 1
        return logits
