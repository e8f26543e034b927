"""Sparse reading in every worker: stored prefixes, requests that decode over them, and what is done in a step.

Only two things of vLLM's are touched. Before the first layer of a step the attention metadata is replaced, once for all
layers: the block table of a sparse request names its sinks, its slots and its tail, and its length is shortened by what
is left out. Rotary positions are in the keys, so attention does not care for their order. Before each layer's attention
the layer's own query selects units, and those that are missing are copied into slots. The kernels are stock's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from polder.emulation.factory import Emulation
from polder.engines.vllm import hooks
from polder.engines.vllm.process import present
from polder.engines.vllm.rank.memory import WorkerMemory
from polder.engines.vllm.rank.outputs import tell
from polder.engines.vllm.sparse.ask import asks
from polder.engines.vllm.sparse.blocks import BlockFormat
from polder.engines.vllm.sparse.decoding import Decoding
from polder.engines.vllm.sparse.homes import Disks, in_memory
from polder.engines.vllm.sparse.prefix import Prefix

__all__ = ["STEPS", "Queries", "WorkerSparse"]

STEPS = "polder_sparse_steps"
"""Attribute of a ModelRunnerOutput: request -> (estimated unread share of attention, units wanted, read, failed)."""
METRIC_TOKENS = 512
"""Queries of a prefix by whose metric its keys are clustered."""


class Queries:
    """What a prompt's last queries were, for each layer."""

    def __init__(self, formats: Sequence[BlockFormat]) -> None:
        self.moments = [torch.zeros(of.kv_heads, of.d, of.d) for of in formats]
        self.last: list[Any] = [None] * len(formats)
        """[heads, d]"""

    def add(self, layer: int, queries: torch.Tensor) -> None:
        """`queries`: [tokens, heads, d]"""
        found = queries.float()
        self.last[layer] = found[-1].numpy().copy()
        moment = self.moments[layer]
        by_head = found.view(len(found), len(moment), -1, found.shape[2]).transpose(0, 1).flatten(1, 2)
        moment += by_head.transpose(1, 2) @ by_head


class WorkerSparse:
    """One rank's."""

    def __init__(self, runner: Any, layers: dict[str, Any], memory: WorkerMemory) -> None:
        """`layers`: vLLM's attention layers by name. Raises ConfigError or BudgetError."""
        self._runner, self._layers = runner, layers
        self.formats = [BlockFormat(name, layer) for name, layer in layers.items()]
        self.make_home = in_memory
        plan = present(memory.plan.sparse)
        if plan.disks:
            emulation = Emulation(links=memory.plan.links, faults=memory.plan.faults)
            self.make_home = Disks(plan, memory.rank, self.formats[0].block_bytes, emulation).home
        self.prefixes: dict[bytes, Prefix] = {}
        self.decoding: dict[str, Decoding] = {}
        self.queries: dict[str, Queries] = {}
        self._listening: list[tuple[slice, Queries]] = []
        self._steps: list[tuple[int, Decoding]] = []
        """Of this pass: (the token's number in the batch, its request)."""
        self._in_step: dict[str, Decoding] = {}
        for number, layer in enumerate(layers.values()):
            self._hook_layer(layer.impl, number)
        hooks.replace(runner, "_model_forward", self._begin_and_forward)
        hooks.replace(runner, "sample_tokens", self._sample_and_tell)

    def forget(self, request: str) -> None:
        """It has ended, or was preempted."""
        self.decoding.pop(request, None)

    def drop(self, key: bytes) -> None:
        """Nobody reads this prefix any more."""
        if key in self.prefixes:
            for layer in self.prefixes.pop(key).layers:
                layer.home.drop()

    # ------------------------------------------------------------------ a pass

    def _begin_and_forward(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin()
        return stock(*args, **kwargs)

    def _begin(self) -> None:
        """Which of the batch's requests decode sparsely, and whose queries are wanted."""
        batch = self._runner.input_batch
        names = batch.req_ids[: batch.num_reqs]
        done = batch.num_computed_tokens_cpu[: batch.num_reqs]
        tokens = self._runner.optimistic_seq_lens_cpu.numpy()[: batch.num_reqs] - done
        firsts = np.cumsum(tokens) - tokens
        table = batch.block_table[0].get_numpy_array()
        self._listening, self._steps, self._in_step, rows = [], [], {}, []
        for row, name in enumerate(names):
            sparse = self.decoding.get(name)
            if sparse is not None:
                sparse.begin(table[row].tolist(), int(done[row]))
                self._steps.append((int(firsts[row]), sparse))
                self._in_step[name] = sparse
                rows.append((row, sparse))
            else:
                self._listen(name, int(firsts[row]), int(done[row]), int(tokens[row]))
        if rows:
            self._shorten(rows)

    def _listen(self, name: str, first: int, done: int, tokens: int) -> None:
        request = self._runner.requests[name]
        if asks(request.sampling_params) is None:
            return
        prompt = request.num_prompt_tokens
        start, end = max(done, prompt - METRIC_TOKENS), min(done + tokens, prompt)
        if start < end:
            if name not in self.queries:
                self.queries = {other: of for other, of in self.queries.items() if other in self._runner.requests}
                self.queries[name] = Queries(self.formats)
            queries = self.queries[name]
            self._listening.append((slice(first + start - done, first + end - done), queries))

    def _shorten(self, rows: Sequence[tuple[int, Decoding]]) -> None:
        """The metadata of this pass, with sparse requests as long as what they read."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        first = metadata[next(iter(self._layers))]
        table, lengths = first.block_table.clone(), first.seq_lens.clone()
        for row, sparse in rows:
            layout = sparse.layout
            kept, end = layout.sink_blocks + sparse.count, layout.end_block
            blocks = -(-int(lengths[row]) // layout.unit_tokens)
            table[row, kept : kept + blocks - end] = first.block_table[row, end:blocks]
            lengths[row] -= (layout.units - sparse.count) * layout.unit_tokens
        changed = dataclasses.replace(
            first,
            block_table=table,
            seq_lens=lengths,
            max_seq_len=int(lengths.max()),
            scheduler_metadata=_kernel_schedule(self._runner, first, lengths),
        )
        for name in self._layers:
            metadata[name] = changed

    def _sample_and_tell(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        if self._in_step:
            layers = len(self.formats)
            steps = {
                name: (each.unread / layers, each.wanted, each.read, each.take_failed())
                for name, each in self._in_step.items()
            }
            tell(output, STEPS, steps)
            self._in_step = {}
        return output

    def _hook_layer(self, impl: Any, number: int) -> None:
        def forward(
            stock: Callable[..., Any],
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            cache: Any,
            metadata: Any,
            *more: Any,
            **named: Any,
        ) -> Any:
            if metadata is not None:
                for tokens, queries in self._listening:
                    queries.add(number, query[tokens])
                for token, sparse in self._steps:
                    sparse.layer(number, query[token], key[token])
            return stock(layer, query, key, value, cache, metadata, *more, **named)

        hooks.replace(impl, "forward", forward)


def _kernel_schedule(runner: Any, metadata: Any, lengths: torch.Tensor) -> torch.Tensor:
    """How the CPU's kernel divides its work, which it plans from the lengths."""
    from vllm import _custom_ops, envs

    builder = runner.attn_groups[0][0].get_metadata_builder()
    schedule: torch.Tensor = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=builder.num_heads,
        num_kv_heads=builder.num_kv_heads,
        head_dim=builder.head_dim,
        seq_lens=lengths,
        dtype=builder.dtype,
        query_start_loc=metadata.query_start_loc,
        causal=metadata.causal,
        sliding_window_size=builder.window_size,
        isa=builder.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        dynamic_causal=metadata.dynamic_causal,
        kv_cache_dtype=builder.kv_cache_dtype,
    )
    return schedule
