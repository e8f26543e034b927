"""What several models on one device win by sharing its memory: how many sequences, and how long, in a fixed slice of
the KV memory, in all of it but the others' floors, and in all of it while the others' weights are away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polder.planner.devices import Device
from polder.planner.engine_memory import engine_bytes
from polder.planner.model_shape import ModelShape

__all__ = ["PoolOutlook", "Pooling"]

CONTEXTS = (8192, 32768, 131072, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class PoolOutlook:
    """One model, one length. Sequences that fit at once; None: the models do not fit together at all."""

    model: str
    context_tokens: int
    sliced: int | None
    """In an equal part of the KV memory, as a stock engine has it."""
    pooled: int | None
    """In all of it but the others' floors, while the others have no requests."""
    alone: int
    """The same with elastic weights, while the others sleep."""


@dataclass(frozen=True, kw_only=True)
class Pooling:
    shapes: Sequence[ModelShape]
    device: Device

    @property
    def kv_bytes(self) -> int:
        """What all engines with their weights leave for KV. Below 0: so much is missing."""
        used = sum(shape.weight_bytes + engine_bytes(shape, self.device.memory_bytes) for shape in self.shapes)
        return self.device.memory_bytes - used

    def floor_bytes(self, shape: ModelShape) -> int:
        """What a model keeps while it is awake, by default: the KV of one request of its longest context."""
        return shape.kv_bytes(self.contexts(shape)[-1])

    def pool_bytes(self, shape: ModelShape) -> int:
        """What a model may have while the others are awake and have no requests. Below 0: their floors do not fit."""
        return self.kv_bytes - sum(self.floor_bytes(other) for other in self.shapes if other is not shape)

    def alone_bytes(self, shape: ModelShape) -> int:
        """The KV memory of a model while all others sleep: their embeddings and engines stay."""
        return self.kv_bytes + sum(other.layer_weight_bytes for other in self.shapes if other is not shape)

    def wake_s(self, shape: ModelShape) -> float | None:
        """Time for the model's weights to come back from host memory. None: the link is not known."""
        link = self.device.host_link
        return None if link is None else shape.layer_weight_bytes / link.bytes_per_s

    def contexts(self, shape: ModelShape) -> list[int]:
        """Lengths to look at, up to the model's own limit."""
        limit = shape.trained_tokens or CONTEXTS[-1]
        return sorted({*(length for length in CONTEXTS if length < limit), limit})

    def outlooks(self) -> list[PoolOutlook]:
        found = []
        for shape in self.shapes:
            for length in self.contexts(shape):
                need = shape.kv_bytes(length)
                together = self.kv_bytes > 0
                found.append(
                    PoolOutlook(
                        model=shape.name,
                        context_tokens=length,
                        sliced=self.kv_bytes // len(self.shapes) // need if together else None,
                        pooled=max(0, self.pool_bytes(shape)) // need if together else None,
                        alone=max(0, self.alone_bytes(shape)) // need,
                    )
                )
        return found
