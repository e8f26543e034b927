"""A device thread: what a step writes to the KV cache gets there later than the step is launched, as on a GPU.

Attention is computed when it is launched, for the tokens are needed. Then the bytes that the layer wrote to its KV cache are
taken back, and one thread, the stream of this device, writes them when somebody waits for them, or after a random delay. Before
it does so it looks whether the layer's blocks, those that it read as well as those that it writes, still hold what they held at
the launch. Changed or unmapped memory is a violation: somebody took "launched" for "done". Violations are counted for the test to
see. What could not be written is lost, so that tokens become wrong.

What waits for the thread, as it would on a GPU:
- the next step: when its first layer touches the KV cache, and when vLLM zeroes blocks;
- who asks for a step's tokens (`get_output` of an asynchronous output);
- `Backend.fence`, and marks of `Backend.mark`, of Polder's CPU backend. With GPULIKE_FENCES=off they wait for nothing.

GPULIKE_SEED is the seed of the delays.
"""

from __future__ import annotations

import ctypes
import os
import queue
import random
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from vllm.v1.outputs import AsyncModelRunnerOutput

__all__ = ["Device", "LateOutput", "Layer", "carry_out", "install"]

MEAN_DELAY_S = 1.0
"""Of one layer for which nobody waits. An interpreted step of the V2 runner takes 0.2 s."""
_libc = ctypes.CDLL(None, use_errno=True)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _vectors(buffer: ctypes.Array[ctypes.c_char], address: int) -> tuple[object, int, object, int, int]:
    size = len(buffer)
    return ctypes.byref(_Vector(ctypes.addressof(buffer), size)), 1, ctypes.byref(_Vector(address, size)), 1, 0


def read_memory(address: int, size_bytes: int) -> bytes | None:
    """Bytes of this process; None, and no SIGSEGV, where no memory is mapped."""
    found = ctypes.create_string_buffer(size_bytes)
    copied = _libc.process_vm_readv(os.getpid(), *_vectors(found, address))
    return found.raw if copied == size_bytes else None


def write_memory(address: int, content: bytes) -> bool:
    """Writes bytes of this process; False, and no SIGSEGV, where no memory is mapped."""
    buffer = (ctypes.c_char * len(content)).from_buffer_copy(content)
    return bool(_libc.process_vm_writev(os.getpid(), *_vectors(buffer, address)) == len(content))


@dataclass(frozen=True, kw_only=True)
class Write:
    """What a layer has written to one block, for the thread to write."""

    address: int
    before: bytes
    after: bytes


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a launched step."""

    read: list[tuple[int, int, int]]
    """Blocks that it only read: address, bytes, hash of them."""
    writes: list[Write]


class Device:
    """The stream. Layers are carried out in the order of their launch; tickets count them."""

    def __init__(self, seed: int, mean_delay_s: float = MEAN_DELAY_S) -> None:
        self._random, self._mean_delay_s = random.Random(seed), mean_delay_s
        self._queue: queue.SimpleQueue[Layer] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self.launched = self._done = self._wanted = self.violations = 0
        self._step_begins = True
        threading.Thread(target=self._run, name="gpulike-device", daemon=True).start()

    def begin_step(self) -> None:
        """A step is being prepared: its first layer will wait for the step before it."""
        self._step_begins = True

    def begin_layer(self) -> None:
        """A layer is about to touch the KV cache."""
        if self._step_begins:
            self._step_begins = False
            self.wait()

    def launch(self, layer: Layer) -> None:
        self.launched += 1
        self._queue.put(layer)

    def done(self, ticket: int) -> bool:
        return self._done >= ticket

    def await_layer(self, ticket: int) -> None:
        """Returns when this layer has been carried out, after its delay: nobody hurries the device."""
        with self._changed:
            self._changed.wait_for(lambda: self._done >= ticket)

    def wait(self, ticket: int | None = None) -> None:
        """Has this layer, or all that was launched, carried out at once."""
        wanted = self.launched if ticket is None else ticket
        with self._changed:
            self._wanted = max(self._wanted, wanted)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= wanted)

    def _run(self) -> None:
        while True:
            layer = self._queue.get()
            delay_s = self._random.expovariate(1 / self._mean_delay_s)
            with self._changed:
                self._changed.wait_for(lambda: self._wanted > self._done, delay_s)
            violations = carry_out(layer)
            with self._changed:
                self.violations += violations
                self._done += 1
                self._changed.notify_all()


def carry_out(layer: Layer) -> int:
    """Writes what a layer has written. Returns the number of violations."""
    violations = 0
    for address, size, expected in layer.read:
        found = read_memory(address, size)
        violations += found is None or xxhash.xxh3_64_intdigest(found) != expected
    for write in layer.writes:
        found = read_memory(write.address, len(write.before))
        violations += found != write.before
        if found is not None:
            before, after, there = (np.frombuffer(each, np.uint8) for each in (write.before, write.after, found))
            violations += not write_memory(write.address, np.where(before != after, after, there).tobytes())
    return violations


@dataclass(frozen=True, kw_only=True)
class Mark:
    """polder.memory.backend.Mark: all that was launched before is over."""

    device: Device
    ticket: int

    def done(self) -> bool:
        return self.device.done(self.ticket)

    def wait(self) -> None:
        self.device.wait(self.ticket)


class LateOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """A step's output, which is there when the step has been carried out."""

    def __init__(self, inner: AsyncModelRunnerOutput, device: Device) -> None:
        self._inner, self._device, self._ticket = inner, device, device.launched

    def get_output(self) -> Any:
        # A thread asks for it as soon as the step is launched. If that hurried the device, no step would ever be late.
        self._device.await_layer(self._ticket)
        return self._inner.get_output()


class _Blocks:
    """The blocks of a layer's KV cache, each of them contiguous."""

    def __init__(self, kv_cache: torch.Tensor) -> None:
        if not kv_cache[0].is_contiguous():
            raise RuntimeError(f"blocks of a KV cache with strides {kv_cache.stride()} are not contiguous")
        self._first = kv_cache.data_ptr()
        self._stride = kv_cache.stride(0) * kv_cache.element_size()
        self.size_bytes = kv_cache[0].numel() * kv_cache.element_size()

    def address(self, block: int) -> int:
        return self._first + block * self._stride

    def bytes_of(self, block: int) -> bytes:
        return ctypes.string_at(self.address(block), self.size_bytes)

    def put(self, block: int, content: bytes) -> None:
        ctypes.memmove(self.address(block), content, self.size_bytes)


def install(device: Device) -> None:
    """Replaces what touches the KV cache in this process: vLLM's attention on a CPU, and order in Polder's CPU backend."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as Attention

    from polder.memory.cpu import CpuBackend

    update, forward = Attention.do_kv_cache_update, Attention.forward
    written: dict[int, dict[int, bytes]] = {}
    """Layer under way -> blocks that it has written -> what they held before."""

    def do_kv_cache_update(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        device.begin_layer()
        blocks, slots = _Blocks(kv_cache), slot_mapping[slot_mapping >= 0]
        numbers = torch.unique(slots // kv_cache.shape[2]).tolist()
        written[id(self)] = {number: blocks.bytes_of(number) for number in numbers}
        update(self, layer, key, value, kv_cache, slot_mapping)

    def forward_and_take_back(
        self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = forward(self, layer, query, key, value, kv_cache, metadata, *args, **kwargs)
        if metadata is None:
            return result
        blocks, before = _Blocks(kv_cache), written.pop(id(self), {})
        writes = []
        for number, content in before.items():
            writes.append(Write(address=blocks.address(number), before=content, after=blocks.bytes_of(number)))
            blocks.put(number, content)
        seen = _blocks_read(metadata, kv_cache.shape[2], self.sliding_window).difference(before)
        read = [
            (blocks.address(number), blocks.size_bytes, xxhash.xxh3_64_intdigest(blocks.bytes_of(number)))
            for number in sorted(seen)
        ]
        device.launch(Layer(read=read, writes=writes))
        return result

    Attention.do_kv_cache_update, Attention.forward = do_kv_cache_update, forward_and_take_back

    if os.environ.get("GPULIKE_FENCES", "on") == "off":
        return

    def mark(self: Any) -> Mark:
        return Mark(device=device, ticket=device.launched)

    CpuBackend.mark = mark  # type: ignore[method-assign, assignment]
    CpuBackend.fence = lambda self: device.wait()  # type: ignore[method-assign]


def _blocks_read(metadata: Any, block_tokens: int, window: int) -> set[int]:
    """Numbers of the blocks that a step's attention reads, the null block left out. `window`: tokens that a layer sees, or -1."""
    found: set[int] = set()
    starts = metadata.query_start_loc.tolist()
    for number, tokens in enumerate(metadata.seq_lens.tolist()):
        asking = starts[number + 1] - starts[number]
        first = max(0, tokens - asking - window) // block_tokens if window > 0 else 0
        found.update(metadata.block_table[number, first : -(-tokens // block_tokens)].tolist())
    return found - {0}
