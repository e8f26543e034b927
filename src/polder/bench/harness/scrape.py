"""What an engine's /metrics says of preemptions, caches and tiers, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["PREEMPTIONS", "REPORTED", "TIER_HITS", "Samples", "cache_samples", "gained", "summed"]

Samples = dict[str, dict[str, float]]
"""Engine -> sample's name -> value."""
PREEMPTIONS = "vllm:num_preemptions_total"
TIER_HITS = "vllm:external_prefix_cache_hits_total"
"""Prompt tokens found behind the engine's own pool."""
REPORTED = "polder_engine_"
"""Prefix of what an engine reports to its broker (polder/metrics.py has the names)."""
PREFIXES = (
    *("polder_", "vllm:polder_", "vllm:kv_offload", "vllm:prefix_cache", "vllm:external_prefix_cache"),
    PREEMPTIONS,
)
"""Prefixes of samples' names: Polder's own, the native connector's, and the tokens that were looked for and found."""
_IDENTITY = ("engine", "model_name")
"""Labels that are the same in all samples of an engine."""
_COUNTS_UP = ("_total", "_sum", "_count")
_SKIPPED = ("_bucket", "_created")


def cache_samples(text: str) -> dict[str, float]:
    """Name with its labels, e.g. "polder_tier_hits_total{tier=peer}" -> value. Buckets of histograms are left out."""
    found: dict[str, float] = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        if sample.name.startswith(PREFIXES) and not sample.name.endswith(_SKIPPED):
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in _IDENTITY)
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def gained(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What each counter gained; a gauge's last value. A sample that began in between began at 0."""
    return {name: now - before.get(name, 0.0) * _counts_up(name) for name, now in after.items()}


def summed(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over runs: sums of what counts up, means of everything else."""
    names = sorted({name for run in runs for name in run})
    return {name: sum(run.get(name, 0.0) for run in runs) / (1 if _counts_up(name) else len(runs)) for name in names}


def _counts_up(name: str) -> bool:
    return name.partition("{")[0].endswith(_COUNTS_UP)
