"""Counters of caches and tiers out of an engine's /metrics."""

from __future__ import annotations

import pytest

from polder.bench.harness.scrape import cache_samples, gained, summed

TEXT = """\
# TYPE vllm:external_prefix_cache_hits_total counter
vllm:external_prefix_cache_hits_total{engine="0",model_name="A"} %d
# TYPE polder_tier_hits_total counter
polder_tier_hits_total{engine="0",model_name="A",tier="peer"} 5.0
polder_tier_hits_total{engine="0",model_name="A",tier="host"} 7.0
# TYPE vllm:polder_tier_used_bytes gauge
vllm:polder_tier_used_bytes{tier="host"} %d
# TYPE vllm:kv_offload_size histogram
vllm:kv_offload_size_bucket{le="1.0",transfer_type="CPU_to_GPU"} 1.0
vllm:kv_offload_size_bucket{le="+Inf",transfer_type="CPU_to_GPU"} 2.0
vllm:kv_offload_size_count{transfer_type="CPU_to_GPU"} 2.0
vllm:kv_offload_size_sum{transfer_type="CPU_to_GPU"} 64.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 3.0
"""


def test_samples_keep_their_own_names_and_the_labels_that_tell_something() -> None:
    assert cache_samples(TEXT % (10, 100)) == {
        "vllm:external_prefix_cache_hits_total": 10.0,
        "polder_tier_hits_total{tier=peer}": 5.0,
        "polder_tier_hits_total{tier=host}": 7.0,
        "vllm:polder_tier_used_bytes{tier=host}": 100.0,
        "vllm:kv_offload_size_count{transfer_type=CPU_to_GPU}": 2.0,
        "vllm:kv_offload_size_sum{transfer_type=CPU_to_GPU}": 64.0,
    }


def test_a_run_gains_what_counters_rose_and_what_gauges_show_at_its_end() -> None:
    run = gained(cache_samples(TEXT % (10, 100)), cache_samples(TEXT % (25, 60)))
    assert run["vllm:external_prefix_cache_hits_total"] == 15.0
    assert run["vllm:polder_tier_used_bytes{tier=host}"] == 60.0
    assert run["polder_tier_hits_total{tier=peer}"] == 0.0
    first = gained({}, cache_samples(TEXT % (25, 60)))
    assert first["vllm:external_prefix_cache_hits_total"] == 25.0, "a sample that began in between began at 0"


def test_over_runs_counters_add_up_and_gauges_are_averaged() -> None:
    runs = [{"polder_hits_total{tier=peer}": 3.0, "polder_used_bytes": 10.0}, {"polder_hits_total{tier=peer}": 4.0}]
    found = summed(runs)
    assert found["polder_hits_total{tier=peer}"] == 7.0
    assert found["polder_used_bytes"] == pytest.approx(5.0)
