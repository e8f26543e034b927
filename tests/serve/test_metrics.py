"""Metric names are public: dashboards break when they change."""

from __future__ import annotations

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from polder.serve.metrics import merge, render
from polder.serve.supervisor import ChildStatus
from polder.tiers.spill import FIGURES
from tests.serve.fakes import MIB, canned_status

CHILD = ChildStatus(name="a", state="ready", pid=1, restarts=2, retry_in_s=0.0, last_exit="")
NAMES = [
    "polder_broker_up",
    "polder_broker_uptime_seconds",
    "polder_child_ready",
    "polder_child_restarts_total",
    "polder_device_free_bytes",
    "polder_device_held_bytes",
    "polder_device_page_bytes",
    "polder_device_total_bytes",
    "polder_engine_borrowed_bytes",
    "polder_engine_busy_bytes",
    "polder_engine_cached_bytes",
    "polder_engine_ceiling_bytes",
    "polder_engine_disk_admission_refused_blocks_total",
    "polder_engine_disk_budget_refused_blocks_total",
    "polder_engine_disk_copied_bytes_total",
    "polder_engine_disk_disks_ok",
    "polder_engine_disk_spilled_blocks_total",
    "polder_engine_disk_written_bytes_per_day",
    "polder_engine_disk_written_bytes_total",
    "polder_engine_evicted_blocks_total",
    "polder_engine_floor_bytes",
    "polder_engine_giveback_preemptions_total",
    "polder_engine_giveback_seconds",
    "polder_engine_grow_seconds_total",
    "polder_engine_grows_total",
    "polder_engine_held_bytes",
    "polder_engine_kv_used_ratio",
    "polder_engine_late_steps_total",
    "polder_engine_lent_borrowed_bytes",
    "polder_engine_lent_borrowed_recalls_total",
    "polder_engine_lent_bytes",
    "polder_engine_lent_offered_bytes",
    "polder_engine_lent_recall_p99_seconds",
    "polder_engine_lent_recalls_total",
    "polder_engine_migrated_blocks_total",
    "polder_engine_paced_steps_total",
    "polder_engine_pauses_total",
    "polder_engine_preemptions_total",
    "polder_engine_prefix_hits_tokens_total",
    "polder_engine_prefix_queries_tokens_total",
    "polder_engine_recalled_bytes_total",
    "polder_engine_running_requests",
    "polder_engine_segments",
    "polder_engine_share_bytes",
    "polder_engine_shrink_seconds_total",
    "polder_engine_shrinks_total",
    "polder_engine_sleeps_total",
    "polder_engine_state",
    "polder_engine_steps_total",
    "polder_engine_target_bytes",
    "polder_engine_unit_bytes",
    "polder_engine_waiting_bytes",
    "polder_engine_waiting_requests",
    "polder_engine_wake_seconds_total",
    "polder_engine_wakes_total",
    "polder_engine_weights_loaded_bytes_total",
    "polder_engine_weights_rotating_layers",
    "polder_engine_weights_stall_seconds_total",
    "polder_grants_total",
    "polder_overdue_recalls_total",
    "polder_recalls_total",
    "polder_reclaimed_pages_total",
    "polder_refused_messages_total",
]


def test_the_names_are_those_that_were_published() -> None:
    families = text_string_to_metric_families(render(canned_status(), [CHILD]))
    assert sorted(f"{f.name}_total" if f.type == "counter" else f.name for f in families) == NAMES


def test_the_values_are_the_status_in_bytes_and_seconds() -> None:
    text = render(canned_status(), [CHILD])
    sizes = {
        s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if "b" not in s.labels.values()
    }
    assert sizes["polder_device_held_bytes"] == 192 * MIB
    assert sizes["polder_engine_borrowed_bytes"] == 32 * MIB
    for line in (
        'polder_engine_prefix_hits_tokens_total{engine="a"} 640.0',
        'polder_engine_waiting_requests{engine="a"} 2.0',
        'polder_engine_state{engine="b",state="serving"} 1.0',
        'polder_engine_giveback_seconds_bucket{engine="b",le="0.05"} 2.0',
        'polder_engine_giveback_seconds_sum{engine="b"} 0.184',
        'polder_child_restarts_total{child="a"} 2.0',
        "polder_overdue_recalls_total 1.0",
    ):
        assert line in text, line
    assert 'steps_total{engine="b"}' not in text, "what an engine does not report is not zero"


def test_every_figure_of_the_disks_is_published() -> None:
    status = canned_status()
    stats = {name: 7.0 + number for number, name in enumerate(FIGURES)}
    engines = [msgspec.structs.replace(status.engines[0], stats=stats), *status.engines[1:]]
    text = render(msgspec.structs.replace(status, engines=engines))
    for name, value in stats.items():
        assert f'polder_engine_{name}{{engine="a"}} {value}' in text


def test_without_a_broker_only_its_absence_is_shown() -> None:
    assert "polder_broker_up 0.0" in render(None)
    assert "polder_grants" not in render(None)


def test_engines_texts_become_one_valid_text() -> None:
    text = (
        '# HELP h Help with engine="x" in it.\n# TYPE h histogram\n'
        'h_bucket{le="1",note="a,engine=\\"q\\" }"} 1\nh_bucket{le="+Inf",note=""} 2\nh_sum 3.25\nh_count 2\n'
        "# HELP g Gauge.\n# TYPE g gauge\n"
        'g{engine="0"} 1e-05\ng{} 4 1700000000000\n# a comment\n\nuntyped 7\n'
    )
    merged = merge([("", "# TYPE own gauge\nown 1\n"), ("a", text), ("b", text)])
    assert merged.count("# HELP h ") == merged.count("# TYPE h ") == merged.count("# TYPE g ") == 1
    assert 'g{engine="a",exported_engine="0"} 1e-05\n' in merged, "digit for digit"
    assert 'h_bucket{engine="b",le="1",note="a,engine=\\"q\\" }"} 1\n' in merged
    assert 'untyped{engine="a"} 7' in merged
    assert "\nown 1\n" in merged
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert len(families["h"].samples) == 8
    assert families["g"].samples[0].labels == {"engine": "a", "exported_engine": "0"}
    lines = merged.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("h_")]
    assert at == list(range(at[0], at[0] + 8)), "a family's samples stand together"
