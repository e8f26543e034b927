"""What an engine's /metrics says of its caches and tiers, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["PREEMPTIONS", "TIER_HITS", "Sample", "cache_samples", "counter", "gained", "summed"]

PREFIXES = ("polder_", "vllm:polder_", "vllm:kv_offload", "vllm:prefix_cache", "vllm:external_prefix_cache")
"""Prefixes of samples' names: Polder's own, the native connector's, and the tokens that were looked for and found."""
_IDENTITY = ("engine", "model_name")
"""Labels that are the same in all samples of an engine."""
PREEMPTIONS = "vllm:num_preemptions_total"
TIER_HITS = "vllm:external_prefix_cache_hits_total"
"""Prompt tokens found behind the engine's own pool."""
_COUNTS_UP = ("_total", "_sum", "_count")
_SKIPPED = ("_bucket", "_created")


@dataclass(frozen=True, kw_only=True)
class Sample:
    value: float
    kind: str
    """Prometheus' type: a gauge tells of this moment, all others of the time since the start."""


def cache_samples(text: str) -> dict[str, Sample]:
    """Name with its labels, e.g. "polder_tier_hits_total{tier=peer}" -> sample. Buckets of histograms are left out."""
    found: dict[str, Sample] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIXES) and not sample.name.endswith(_SKIPPED):
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in _IDENTITY)
                name = f"{sample.name}{{{labels}}}" if labels else sample.name
                found[name] = Sample(value=sample.value, kind=family.type)
    return found


def counter(text: str, name: str) -> float:
    """Sum of the samples of that name."""
    families = text_string_to_metric_families(text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def gained(before: Mapping[str, Sample], after: Mapping[str, Sample]) -> dict[str, float]:
    """What each sample gained; a gauge's last value. A sample that began in between began at 0."""
    return {
        name: now.value if now.kind == "gauge" or name not in before else now.value - before[name].value
        for name, now in after.items()
    }


def summed(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over runs: sums of what counts up, means of everything else."""
    found: dict[str, float] = {}
    for name in sorted({name for run in runs for name in run}):
        total = sum(run.get(name, 0.0) for run in runs)
        found[name] = total if name.partition("{")[0].endswith(_COUNTS_UP) else total / len(runs)
    return found
