"""What an engine takes from its device beside weights and KV memory."""

from __future__ import annotations

from polder.planner.model_shape import ModelShape

__all__ = [
    *(
        "CONTEXT_BYTES",
        "GRAPH_BYTES",
        "IMAGE_BYTES",
        "PROCESS_BYTES",
        "activation_bytes",
        "default_batch",
        "engine_bytes",
    ),
]

GIB = 1 << 30
CONTEXT_BYTES, GRAPH_BYTES, IMAGE_BYTES, PROCESS_BYTES = GIB, GIB, 2 * GIB, GIB
"""Assumptions for each engine: a CUDA context with the libraries' workspaces; CUDA graphs; a multimodal model's encoder
at work; Python and torch in host memory."""


def default_batch(on_cpu: bool, device_bytes: int | None) -> tuple[int, int]:
    """vLLM's defaults for a server: tokens of a step, and sequences."""
    if on_cpu:
        return 2048, 128
    if device_bytes is None or device_bytes >= 160 * GIB:
        return 16384, 1024
    return (8192, 1024) if device_bytes >= 70 * GIB else (2048, 256)


def activation_bytes(shape: ModelShape, tokens: int, sequences: int) -> int:
    """The largest step: hidden states of its tokens, or the logits of all sequences."""
    return max(tokens * shape.activation_bytes_per_token, min(tokens, sequences) * shape.logit_bytes)


def engine_bytes(shape: ModelShape, device_bytes: int) -> int:
    """An engine's activations, context and graphs on a GPU of that size, with vLLM's defaults."""
    return activation_bytes(shape, *default_batch(False, device_bytes)) + CONTEXT_BYTES + GRAPH_BYTES
