"""What an elastic bench compared, in words and numbers, for the `conditions` of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polder.bench.harness.engines import ENGINE_ENV, EnginePlan
from polder.bench.harness.runs import Run
from polder.bench.plan import BUDGET_BYTES, BUDGET_WHY, USERS, BenchPlan
from polder.bench.report.metrics import RunRecords, percentile, ttfts_ms
from polder.bench.workloads.models import MODEL_A, MODEL_B
from polder.memory.page import PAGE_BYTES

__all__ = ["describe_bench", "describe_runs"]


def describe_bench(plan: BenchPlan, engines: Sequence[EnginePlan]) -> dict[str, Any]:
    """Budget, engines, workload and order of the runs: what was to be done."""
    blocks = {engine.name: engine.blocks for engine in engines}
    return {
        "plan": asdict(plan),
        "budget": {
            "bytes": BUDGET_BYTES,
            "why": BUDGET_WHY,
            "stock": {name: {"blocks": count, "bytes": BUDGET_BYTES // 2} for name, count in blocks.items()},
            "polder": {"bytes": BUDGET_BYTES, "pages": BUDGET_BYTES // PAGE_BYTES, "page_bytes": PAGE_BYTES},
        },
        "engines": {
            "A": f"{MODEL_A.name}: Llama, {MODEL_A.layers} layers, {MODEL_A.kv_bytes_per_token} B of KV per token, bf16",
            "B": f"{MODEL_B.name}: Qwen3, {MODEL_B.layers} layers, {MODEL_B.kv_bytes_per_token} B of KV per token, bf16",
            "arguments": " ".join(engines[0].arguments()),
            "environment": ENGINE_ENV,
            "cores": "all processes of A on core 0, all of B on core 1; gateway, broker and client where there is room",
            "endpoint": "both arms behind the same gateway; the tax stage asks the engines themselves",
        },
        "workload": {
            "A": f"tiny-agent-v1, closed loop, {USERS} users, sessions 0-{plan.sessions - 1}; "
            "first turns of the users' first sessions are not in TTFT",
            "B": "tiny-burst-v1, open loop: its 238 requests once, measured; "
            "then again as load, not measured, until A is through",
            "warm-up": "before the runs each arm gets the last prompt of every session of A, and B's trace; not counted",
            "tax": "B's 238 requests one after the other on engine B alone, in blocks that alternate between the arms",
        },
        "order": ["stock" if letter == "A" else "polder" for letter in plan.order],
    }


def describe_runs(runs: Sequence[Run], intervals: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The runs one by one, and how sure the ratios are: what was done."""
    return {
        "intervals": {key: list(interval) for key, interval in sorted(intervals.items())},
        "intervals_how": "95 %, bootstrap: requests resampled within each arm (main runs), pairs of runs resampled (tax)",
        "runs": [
            {
                "arm": run.arm,
                "wall_s": round(run.wall_s, 1),
                "client_cpu_s": round(run.client_cpu_s, 2),
                "load_before": run.load_before,
                "load_after": run.load_after,
                "ttft_p99_ms": {
                    engine: round(percentile(ttfts_ms(RunRecords(records=records).good), 99))
                    for engine, records in run.records.items()
                },
            }
            for run in runs
        ],
    }
