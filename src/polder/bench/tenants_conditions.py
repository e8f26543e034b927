"""What `polder bench tenants` compared, in words and numbers, for the `conditions` of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polder.bench.harness.engines import BLOCK_TOKENS, ENGINE_ENV, EnginePlan
from polder.bench.stages.comeback import OUTPUT_TOKENS
from polder.bench.tenants_metrics import TenantsRun
from polder.bench.tenants_plan import (
    BUDGET_BYTES,
    COMEBACK_ENGINE,
    EQUALITY_ENGINES,
    KV_SHARE_BYTES,
    SHORT_BATCHED_TOKENS,
    SLOT_S,
    TBT_GOAL,
    WEIGHTS_LINK_BYTES_PER_S,
    TenantsPlan,
)
from polder.bench.workloads.tenants import SPATIAL_ENGINES, TURNS
from polder.bench.workloads.tenants_models import layer_bytes, weights_bytes

__all__ = ["describe_tenants", "describe_tenants_runs"]


def describe_tenants(plan: TenantsPlan, engines: Sequence[EnginePlan]) -> dict[str, Any]:
    """Budget, engines, workload and order of the runs: what was to be done."""
    weights = sum(engine.weights_bytes for engine in engines)
    return {
        "plan": asdict(plan) | {"slots": [plan.slots.start, plan.slots.stop]},
        "budget": {
            "bytes": BUDGET_BYTES,
            "weights_bytes": weights,
            "weights_part": round(weights / BUDGET_BYTES, 3),
            "kv_bytes": BUDGET_BYTES - weights,
            "stock": f"all weights resident, {KV_SHARE_BYTES} B of KV for each model",
            "kv-only": f"all weights resident, {BUDGET_BYTES - weights} B of KV, a third of it each model's own on demand",
            "stock-short": f"as stock, steps of at most {SHORT_BATCHED_TOKENS} tokens",
            "polder": f"{BUDGET_BYTES} B for weights and KV; a goal of {TBT_GOAL} for tokens while others prefill",
            "beside it": "embeddings, heads and last norms, which stay where they are in all arms; and Polder's host copy of the "
            "layers, which is ordinary memory",
        },
        "engines": {
            "models": {
                e.name: f"{e.recipe.name}: {e.recipe.family}, {e.recipe.layers} layers of {layer_bytes(e.recipe)} B in "
                f"{weights_bytes(e.recipe) // e.recipe.layers} B of pages, {e.recipe.kv_bytes_per_token} B of KV per token, bf16"
                for e in engines
            },
            "pool_tokens": {e.name: e.blocks * BLOCK_TOKENS for e in engines},
            "arguments": " ".join(engines[0].arguments()),
            "environment": ENGINE_ENV,
            "cores": f"all engines compute on core {engines[0].core}, as on one device; their other processes, copies, gateway, "
            f"broker and client on cores {engines[0].cpus}",
            "endpoint": "all arms behind the same gateway",
        },
        "workload": {
            "temporal": f"tenants-v1, slots {plan.slots.start} to {plan.slots.stop - 1} of {SLOT_S:g} s, open loop: in each, "
            f"conversations of {TURNS} turns with the model whose turn it is; a rate multiplies the conversations that begin",
            "spatial": f"{' and '.join(SPATIAL_ENGINES)}, {plan.spatial_users} users each, closed loop without pauses; T3 idle",
            "comeback": f"{COMEBACK_ENGINE} by itself, one request at a time, {OUTPUT_TOKENS} tokens; the memory is free when "
            "it wakes",
            "streaming": f"{COMEBACK_ENGINE} by itself, one request that decodes, over the emulated link",
            "emulated link": f"{WEIGHTS_LINK_BYTES_PER_S / 1e9:g} GB/s: bytes are copied, and count as there when the link would "
            "have carried them",
            "equality": f"{' and '.join(EQUALITY_ENGINES)} in float32, five rounds of the same prompts, all at once",
            "warm-up": "each arm, once up, gets long prompts on each model in turn; not counted; prefix caches are emptied "
            "before each run, weights stay where they are",
            "stock's KV is exhausted": "where the contexts asked for at once do not fit its pool for more than a twentieth of "
            "the time with work, or a request was preempted; arms named without a load are the runs at these rates together",
        },
        "legs": [asdict(leg) for leg in plan.legs],
    }


def describe_tenants_runs(runs: Sequence[TenantsRun], intervals: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The runs one by one, and how sure the ratios are: what was done."""
    return {
        "intervals": {key: list(interval) for key, interval in sorted(intervals.items())},
        "intervals_how": "95 %, bootstrap: requests (TTFT) or gaps (TBT) resampled within each arm",
        "runs": [
            {
                "arm": one.run.arm,
                "load": one.load,
                "wall_s": round(one.run.wall_s, 1),
                "client_cpu_s": round(one.run.client_cpu_s, 2),
                "load_before": one.run.load_before,
                "load_after": one.run.load_after,
                "foreign_cpu_s": round(one.run.foreign_cpu_s, 2),
                "wakes": {engine: counts["wakes"] for engine, counts in one.weights.items()},
            }
            for one in sorted(runs, key=lambda one: one.run.started_at)
        ],
    }
