"""What `polder bench turns` compared, in words and numbers, for the `conditions` of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polder.bench.harness.engines import ENGINE_ENV, EnginePlan
from polder.bench.harness.runs import Run
from polder.bench.report.metrics import RunRecords, percentile, ttfts_ms
from polder.bench.turns_plan import EQUALITY_BYTES, LINKS_BYTES_PER_S, LOAD_BYTES, USERS, TurnsPlan
from polder.bench.workloads.models import MODEL_A, MODEL_B

__all__ = ["describe_links", "describe_turns", "describe_turns_runs"]


def describe_links(plan: TurnsPlan) -> str:
    """One line that has to stand beside every figure of a run."""
    if plan.links == "none":
        return "links not emulated: peer and host are both this machine's memory, at the speed of memcpy"
    peer, host = (LINKS_BYTES_PER_S[name] for name in ("peer", "host"))
    return (
        f"links emulated: peer {peer / 1e9:g} GB/s, host {host / 1e6:g} MB/s, each direction by itself; bytes are copied, then the "
        "copying thread sleeps until the link would have carried them; native's CPU tier is behind the host link"
    )


def describe_turns(plan: TurnsPlan, engines: Sequence[EnginePlan]) -> dict[str, Any]:
    """Bytes, links, engines, workload and order of the runs: what was to be done."""
    per_token = MODEL_A.kv_bytes_per_token
    sizes = LOAD_BYTES
    return {
        "plan": asdict(plan),
        "links": describe_links(plan),
        "bytes": {
            "pools, all arms": {"A": sizes.pool_a, "B": sizes.pool_b},
            "stock": "pools alone",
            "native": f"A: CPU tier of {sizes.native} B = host tier and loan together, vLLM's OffloadingConnector, LRU",
            "polder-host": f"A: host tier of {sizes.host} B",
            "polder-peer": f"A: at most {sizes.lend_b} B of B's own pool, on loan: no bytes beyond the stock arm's",
            "polder": f"A: host tier of {sizes.host} B and at most {sizes.lend_b} B on loan",
            "tokens of A": {
                "pool": sizes.pool_a // per_token,
                "host": sizes.host // per_token,
                "loan": sizes.lend_b // per_token,
                "native": sizes.native // per_token,
            },
            "equality, float32": asdict(EQUALITY_BYTES),
        },
        "engines": {
            "A": f"{MODEL_A.name}: Llama, {MODEL_A.layers} layers, {MODEL_A.kv_bytes_per_token} B of KV per token, bf16",
            "B": f"{MODEL_B.name}: Qwen3, {MODEL_B.layers} layers, {MODEL_B.kv_bytes_per_token} B of KV per token, bf16",
            "blocks": {engine.name: engine.blocks for engine in engines},
            "arguments": " ".join(engines[0].arguments()),
            "environment": ENGINE_ENV,
            "cores": "all processes of A on core 0, all of B on core 1; gateway, broker and client where there is room",
            "endpoint": "all arms behind the same gateway; the noreuse stage asks the engines themselves",
        },
        "workload": {
            "A": f"agents: tiny-agent-v1, closed loop, {USERS} users, sessions 0-{plan.sessions - 1}; "
            "first turns of the users' first sessions are not in TTFT. chat: tiny-chat-v1, open loop",
            "B": "tiny-burst-v1, open loop: its 238 requests once, measured; "
            "then again as load, not measured, until A is through",
            "warm-up": "each arm, once up, gets the last prompt of every user's first session on A and B's trace; not counted; "
            "all caches and tiers are emptied before each run",
            "noreuse": "engine A alone, unique prompts in blocks that alternate between stock and polder",
            "lender": "B under its trace while A, not measured, is under the agents' pressure",
            "equality": "float32; the same prompts in three rounds, all at once; B's load of the second takes its memory back",
        },
        "order": list(plan.agents_order),
    }


def describe_turns_runs(runs: Sequence[Run], intervals: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The runs one by one, and how sure the ratios are: what was done."""
    return {
        "intervals": {key: list(interval) for key, interval in sorted(intervals.items())},
        "intervals_how": "95 %, bootstrap: requests (TTFT) or gaps (TBT) resampled within each arm; in noreuse, pairs of blocks",
        "runs": [
            {
                "arm": run.arm,
                "wall_s": round(run.wall_s, 1),
                "client_cpu_s": round(run.client_cpu_s, 2),
                "load_before": run.load_before,
                "load_after": run.load_after,
                "foreign_cpu_s": round(run.foreign_cpu_s, 2),
                "ttft_p99_ms": {
                    engine: round(percentile(ttfts_ms(good), 99))
                    for engine, records in run.records.items()
                    if (good := RunRecords(records=records).good)
                },
            }
            for run in sorted(runs, key=lambda run: run.started_at)
        ],
    }
