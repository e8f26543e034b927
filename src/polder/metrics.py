"""Every metric of Polder, declared once: its name, kind, unit and meaning.

An engine reports its metrics to the broker as a flat dictionary, `EngineStatus.stats`. `polder serve` exports them as
`polder_engine_NAME`. vLLM's own /metrics has those of tiers and disks as `vllm:polder_NAME`. docs/metrics.md is
generated from this file. To add a metric, add one line here and put its value into `stats` where it is measured. A
label of an engine's metric has fixed values: add it to `_LABELS`, and write it in the middle of the key, as in
"tier_{tier}_used_bytes".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from polder.errors import ConfigError, IntegrityError

__all__ = [
    "BROKER",
    "CHILD",
    "CORE",
    "DEVICE",
    "DISKS",
    "ENGINE",
    "ENGINE_GROUPS",
    "GIVEBACK",
    "LENDING",
    "PACING",
    "SPARSE",
    "SPARSE_NOW",
    "STATUS",
    "TIERS",
    "TIER_NAMES",
    "WEIGHTS",
    "WEIGHT_RANKS",
    "WINDOW",
    "WINDOW_POINTS",
    "WINDOW_RANKS",
    "Metric",
    "checked",
    "zeros",
]

TIER_NAMES = ("peer", "host", "disk")
"""From the fastest to the slowest."""
WINDOW_POINTS = ("few", "half", "all")
"""Numbers of windowed blocks for which a step is measured when an engine starts."""
_LABELS = {"tier": TIER_NAMES, "point": WINDOW_POINTS}
_PLACEHOLDER = re.compile(r"\{(\w+)\}_")


@dataclass(frozen=True, kw_only=True)
class Metric:
    key: str
    """The name in `stats`. A label stands in braces: "tier_{tier}_hit_tokens_total"."""
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """Empty for a plain count."""
    help: str
    labels: tuple[str, ...] = ()
    """Labels besides the engine, device or child that the metric belongs to."""

    @property
    def name(self) -> str:
        """The exported name without its prefix: "tier_hit_tokens_total"."""
        return _PLACEHOLDER.sub("", self.key)

    @property
    def series(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(key in `stats`, label values) of each time series; the tiers' metrics have one for each tier."""
        placeholder = _PLACEHOLDER.search(self.key)
        if placeholder is None:
            yield self.key, ()
            return
        if placeholder[1] not in _LABELS:
            raise ConfigError(
                f"{self.key}: no values for the label {placeholder[1]!r}; add it to _LABELS in metrics.py"
            )
        for value in _LABELS[placeholder[1]]:
            yield self.key.replace(f"{{{placeholder[1]}}}", value), (value,)


def _counter(key: str, unit: str, text: str, *labels: str) -> Metric:
    return Metric(key=key, kind="counter", unit=unit, help=text, labels=(*_PLACEHOLDER.findall(key), *labels))


def _gauge(key: str, unit: str, text: str, *labels: str) -> Metric:
    return Metric(key=key, kind="gauge", unit=unit, help=text, labels=(*_PLACEHOLDER.findall(key), *labels))


CORE = (
    _gauge("running_requests", "", "Requests that are running"),
    _gauge("waiting_requests", "", "Requests that wait to be scheduled"),
    _gauge("kv_used_ratio", "ratio", "Share of the engine's blocks that running requests hold"),
    _gauge("seconds_per_token", "seconds", "Measured time to compute one more prompt token; 0 until it is known"),
    _counter("prefix_queries_tokens_total", "tokens", "Prompt tokens looked up in the prefix cache"),
    _counter("prefix_hits_tokens_total", "tokens", "Prompt tokens found in the prefix cache"),
    _counter("preemptions_total", "", "Requests preempted, for any reason"),
    _counter("giveback_preemptions_total", "", "Requests preempted to give memory back"),
    _counter("grows_total", "", "Times the KV cache grew"),
    _counter("shrinks_total", "", "Times the KV cache shrank"),
    _counter("grow_seconds_total", "seconds", "Time spent growing, between steps"),
    _counter("shrink_seconds_total", "seconds", "Time spent shrinking, between steps"),
    _gauge("grow_max_seconds", "seconds", "The longest time that one growth took"),
    _gauge("shrink_max_seconds", "seconds", "The longest time that one shrink took"),
    _counter("migrated_blocks_total", "blocks", "Blocks moved out of units that were given back"),
    _counter("evicted_blocks_total", "blocks", "Cached blocks lost to shrinking"),
    _counter("steps_total", "", "Engine steps"),
)
PACING = (
    _counter("paced_steps_total", "", "Steps whose prefill was cut short to keep tbt_goal"),
    _counter("late_steps_total", "", "Steps with tokens of running requests that took longer than tbt_goal"),
)
WEIGHTS = (
    _gauge("segments", "layers", "Layers whose weights have memory on the device"),
    _counter("wakes_total", "", "Times the engine got weights while it had none, also at its start"),
    _counter("sleeps_total", "", "Times the engine gave up all of its weights"),
    _counter("pauses_total", "", "Times the engine gave up its weights while it had requests, which then waited"),
    _counter("wake_seconds_total", "seconds", "Waiting for memory for the weights, from request to mapped pages"),
    _gauge("wake_max_seconds", "seconds", "The longest wait of a request for memory for the weights"),
)
WEIGHT_RANKS = (
    _counter("weights_loaded_bytes_total", "bytes", "Weights copied from the host, on one rank"),
    _counter("weights_loads_total", "", "Layers copied from the host, on one rank"),
    _counter("weights_copy_seconds_total", "seconds", "Time that copies of weights from the host took, on one rank"),
    _counter("weights_stalls_total", "", "Times that computing waited for a layer, on one rank"),
    _counter("weights_stall_seconds_total", "seconds", "Time that computing waited for layers, on one rank"),
    _gauge("weights_pass_stall_seconds", "seconds", "The longest wait for layers in one of the last 16 passes"),
    _gauge("weights_resident_bytes", "bytes", "Weights that cannot move and stay on the device, on one rank"),
    _gauge("weights_rotating_layers", "layers", "Layers streamed in every pass"),
)
WINDOW = (
    _gauge("window_units", "units", "Windowed units"),
    _gauge("window_carriers", "units", "Regular units that gave their pages to windowed units (donors)"),
    _counter("window_opens_total", "", "Times that windowed units were made"),
    _counter("window_closes_total", "", "Times that windowed units became regular units again"),
    _counter("window_home_blocks_total", "blocks", "Windowed blocks copied to regular blocks"),
    _counter("window_lost_total", "", "Requests computed again, because windowed blocks were lost"),
)
WINDOW_RANKS = (
    _counter("window_loaded_bytes_total", "bytes", "Windowed KV copied from the host, on one rank"),
    _counter("window_stored_bytes_total", "bytes", "Windowed KV copied to the host, on one rank"),
    _counter("window_stall_seconds_total", "seconds", "Time that computing waited for windowed KV, on one rank"),
    _counter("window_copy_seconds_total", "seconds", "Time that copies of windowed KV took, on one rank"),
    _counter("window_passes_total", "", "Forward passes with windowed blocks"),
    _counter("window_failures_total", "", "Passes whose copies failed"),
    _gauge("window_step_seconds", "seconds", "Measured at the start: one token with next to no context"),
    _gauge(
        "window_context_seconds_per_token",
        "seconds",
        "Measured at the start: additional time for each token of context",
    ),
    _gauge(
        "window_layer_seconds", "seconds", "Measured at the start: cost of a layer with copies, besides their bytes"
    ),
    _gauge("window_link_bytes_per_second", "bytes/s", "Measured at the start: speed of the copies"),
    _gauge("window_contention_seconds_per_byte", "seconds", "Measured at the start: slowdown by each byte copied"),
    _gauge("window_measured_{point}_blocks", "blocks", "Windowed blocks of a step that was measured at the start"),
    _gauge(
        "window_measured_{point}_seconds",
        "seconds",
        "Measured at the start: how much longer a step with these blocks took",
    ),
)
SPARSE = (
    _counter("sparse_requests_total", "", "Times that a request began to read a part of its prefix"),
    _counter("sparse_refused_total", "", "Requests that asked for sparse reading and read all: short, or no room"),
    _counter("sparse_reused_total", "", "Requests that found their prefix stored in units by an earlier one"),
    _counter("sparse_fallbacks_total", "", "Requests computed again to read all, for too much was left unread"),
    _counter("sparse_tokens_total", "tokens", "Tokens of requests that read a part of their prefix"),
    _counter("sparse_wanted_units_total", "units", "Units that layers have selected, on one rank"),
    _counter("sparse_read_units_total", "units", "Units that were selected and not in a slot, on one rank"),
    _counter("sparse_failed_units_total", "units", "Units that could not be read, and were left out, on one rank"),
    _counter("sparse_store_seconds_total", "seconds", "Time spent on clustering prefixes and on filling slots"),
    _gauge("sparse_unread_ratio", "ratio", "Estimated share of attention that the last sparse token did not read"),
)
SPARSE_NOW = (
    _gauge("sparse_prefixes", "", "Prefixes stored in units"),
    _gauge("sparse_used_bytes", "bytes", "Host memory with units and their index, on one rank"),
    _gauge("sparse_running_requests", "", "Requests that read a part of their prefix at present"),
)
LENDING = (
    _gauge("lent_offered_bytes", "bytes", "Idle KV memory on offer to other engines"),
    _gauge("lent_borrowed_bytes", "bytes", "Offered KV memory that other engines hold"),
    _counter("lent_recalls_total", "blocks", "Blocks on offer that the owner took back for itself"),
    _counter(
        "lent_borrowed_recalls_total", "blocks", "Blocks that the owner took back with a borrower's bytes in them"
    ),
    _gauge("lent_recall_p99_seconds", "seconds", "Wait for a borrower when a block is taken back, the last 4096 times"),
    _gauge("lent_recall_max_seconds", "seconds", "The longest wait for a borrower when a block is taken back"),
)
TIERS = (
    _gauge("tier_{tier}_used_bytes", "bytes", "KV in the tier now"),
    _gauge("tier_{tier}_size_bytes", "bytes", "Size of the tier now"),
    _gauge("tier_{tier}_load_bytes_per_second", "bytes/s", "Measured speed of recent loads"),
    _counter("tier_{tier}_hit_tokens_total", "tokens", "Tokens whose load was begun"),
    _counter("tier_{tier}_loaded_bytes_total", "bytes", "KV copied from the tier"),
    _counter("tier_{tier}_load_seconds_total", "seconds", "Time that the tier was busy with loads"),
    _counter("tier_{tier}_stored_bytes_total", "bytes", "KV copied to the tier"),
    _counter("tier_{tier}_store_seconds_total", "seconds", "Time that the tier was busy with stores"),
    _counter("tier_{tier}_lost_loads_total", "", "Loads that failed because the owner took the memory back"),
    _counter("tier_{tier}_corrupt_blocks_total", "blocks", "Blocks whose checksum was wrong; they were computed"),
    _counter("tier_{tier}_failed_blocks_total", "blocks", "Blocks whose copy failed for another reason"),
    _counter("tier_asked_tokens_total", "tokens", "Tokens that were not in the engine's own cache"),
    _counter("tier_refused_loads_total", "", "Loads cut short or refused as slower than computing"),
    _counter("tier_refused_tokens_total", "tokens", "Tokens found in a tier but computed, because loading is slower"),
    _counter("tier_early_loads_total", "", "Loads begun when the request arrived"),
    _counter("tier_late_loads_total", "", "Loads that took longer than computing would have"),
    _counter("tier_late_tokens_total", "tokens", "Tokens whose load took longer than computing would have"),
    _counter("tier_failed_loads_total", "", "Loads that failed; their tokens were computed"),
    _counter("tier_lost_blocks_total", "blocks", "Blocks lost because their owner took the memory back"),
    _counter("tier_stored_blocks_total", "blocks", "Blocks stored in any tier"),
    _counter("tier_unwritten_blocks_total", "blocks", "Blocks not stored, because too few come back at present"),
    _counter("tier_unread_bytes_total", "bytes", "KV evicted from the tiers without ever being read"),
    _counter("tier_saved_prefill_seconds_total", "seconds", "Prefill saved by loads, at the measured rate"),
    _counter("tier_load_wait_seconds_total", "seconds", "Time that requests waited for loads"),
    _gauge("tier_prefill_seconds_per_token", "seconds", "Measured time to compute one prompt token"),
    _gauge("tier_writing_pays", "", "1 while blocks are stored, 0 while too few come back"),
)
DISKS = (
    _counter("disk_written_bytes_total", "bytes", "Bytes written to the disks, second copies included, on all ranks"),
    _counter(
        "disk_copied_bytes_total", "bytes", "Bytes written to the disks that are second copies of pages read most"
    ),
    _gauge("disk_written_bytes_per_day", "bytes", "Bytes a day, at the rate of the last hour, on all ranks"),
    _counter("disk_spilled_blocks_total", "blocks", "Blocks written from host memory to disk"),
    _counter(
        "disk_admission_refused_blocks_total", "blocks", "Blocks not written, because too few like them come back"
    ),
    _counter("disk_budget_refused_blocks_total", "blocks", "Blocks not written, because disk_writes is used up"),
    _gauge("disk_disks_ok", "disks", "Disks that can be read and written, each counted once a rank"),
)
ENGINE_GROUPS: dict[str, tuple[Metric, ...]] = {
    "KV cache": CORE,
    "Steps in time (`tbt_goal`)": PACING,
    "Weights": (*WEIGHTS, *WEIGHT_RANKS),
    "Window": (*WINDOW, *WINDOW_RANKS),
    "Sparse reading": (*SPARSE, *SPARSE_NOW),
    "Lending": LENDING,
    "Tiers": TIERS,
    "Disks": DISKS,
}
ENGINE = tuple(metric for group in ENGINE_GROUPS.values() for metric in group)
"""What an engine itself reports."""

STATUS = (
    _gauge("held_bytes", "bytes", "Memory mapped or being mapped"),
    _gauge("busy_bytes", "bytes", "What running requests need"),
    _gauge("waiting_bytes", "bytes", "What waiting requests need in addition"),
    _gauge("cached_bytes", "bytes", "Memory that holds reusable KV"),
    _gauge("target_bytes", "bytes", "What the policy wants the engine to hold"),
    _gauge("floor_bytes", "bytes", "What is never taken from the engine while it is awake"),
    _gauge("share_bytes", "bytes", "What is the engine's own on demand"),
    _gauge("ceiling_bytes", "bytes", "The most that the engine can hold"),
    _gauge("borrowed_bytes", "bytes", "Memory held above the share"),
    _gauge("lent_bytes", "bytes", "Memory missing from the share while others hold it"),
    _counter("recalled_bytes_total", "bytes", "Memory given back on recall"),
    _gauge("unit_bytes", "bytes", "The step in which the KV cache grows"),
    _gauge("state", "", "1 for the state that the engine is in", "state"),
)
"""What the broker knows of each engine."""
GIVEBACK = Metric(
    key="giveback_seconds",
    kind="histogram",
    unit="seconds",
    help="From an engine's need within its share to mapped pages, the last 512 times: counts can fall, use no rate()",
)
DEVICE = (
    _gauge("total_bytes", "bytes", "The KV budget"),
    _gauge("free_bytes", "bytes", "Memory that nobody holds"),
    _gauge("page_bytes", "bytes", "Size of a page"),
    _gauge("held_bytes", "bytes", "Memory by owner and use", "engine", "use"),
)
BROKER = (
    _gauge("broker_up", "", "1 while the broker answers"),
    _gauge("broker_uptime_seconds", "seconds", "Time since the broker started"),
    _counter("grants_total", "", "Grants of memory to engines"),
    _counter("recalls_total", "", "Recalls of memory from engines"),
    _counter("overdue_recalls_total", "", "Recalls past their deadline"),
    _counter("refused_messages_total", "", "Messages that the broker refused"),
    _counter("reclaimed_pages_total", "pages", "Pages taken back from dead engines"),
)
CHILD = (
    _gauge("ready", "", "1 while the process is up and ready"),
    _counter("restarts_total", "", "Restarts since the fleet started"),
)

_DECLARED = frozenset(key for metric in ENGINE for key, _ in metric.series)


def zeros(group: Iterable[Metric]) -> dict[str, float]:
    """The counters to begin with: each key of the group at 0. `+=` on a key that is not declared raises KeyError."""
    return {key: 0.0 for metric in group for key, _ in metric.series}


def checked(stats: Mapping[str, float]) -> dict[str, float]:
    """The same values. Raises IntegrityError when one of them is not declared."""
    unknown = sorted(stats.keys() - _DECLARED)
    if unknown:
        raise IntegrityError(f"metrics without a declaration: {', '.join(unknown)}; declare them in polder/metrics.py")
    return dict(stats)
