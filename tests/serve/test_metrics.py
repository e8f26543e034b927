"""Metric names are public: dashboards break when they change."""

from __future__ import annotations

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from polder import metrics
from polder.broker.wire import Status
from polder.serve.child import ChildStatus
from polder.serve.metrics import merge, render
from tests.serve.fakes import MIB, canned_status

CHILD = ChildStatus(name="a", state="ready", pid=1, restarts=2, retry_in_s=0.0, last_exit="")


def with_stats(stats: dict[str, float]) -> Status:
    status = canned_status()
    return replace(status, engines=[replace(status.engines[0], stats=stats), *status.engines[1:]])


def test_each_declared_metric_is_exported_once_it_is_reported() -> None:
    stats = {key: 7.0 for metric in metrics.ENGINE for key, _ in metric.series}
    text = render(with_stats(stats), [CHILD])
    found = {f"{f.name}_total" if f.type == "counter" else f.name for f in text_string_to_metric_families(text)}
    declared = {f"polder_{metric.name}" for metric in metrics.BROKER}
    declared |= {f"polder_child_{metric.name}" for metric in metrics.CHILD}
    declared |= {f"polder_device_{metric.name}" for metric in metrics.DEVICE}
    declared |= {f"polder_engine_{m.name}" for m in (*metrics.STATUS, metrics.GIVEBACK, *metrics.ENGINE)}
    assert found == declared
    assert 'polder_engine_tier_hit_tokens_total{engine="a",tier="host"} 7.0' in text


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
