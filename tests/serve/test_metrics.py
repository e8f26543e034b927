"""Metric names are public: dashboards break when they change."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from polder.broker.wire import DeviceStatus, EngineStatus, Status
from polder.serve.metrics import METRIC_NAMES, render_status

ENGINE = EngineStatus(
    engine="a",
    model="m",
    pid=1,
    devices=["cpu:0"],
    state="serving",
    pages_per_unit=8,
    unit_tokens=2048,
    held_units=12,
    floor_units=3,
    share_units=10,
    ceiling_units=19,
    target_units=12,
    pinned_units=0,
    busy_units=4,
    waiting_units=1,
    cached_units=11,
    borrowed_units=2,
    lent_units=0,
    recalled_units=5,
    reason="requests, within its share",
    curve=[0.0, 0.5],
    giveback_ms=[150.0],
    stats={"prefix_queries_tokens_total": 100.0, "prefix_hits_tokens_total": 75.0, "steps_total": 9.0},
)
STATUS = Status(
    generation=1,
    uptime_s=12.0,
    devices=[
        DeviceStatus(device="cpu:0", page_bytes=2 << 20, total_pages=160, free_pages=64, pages_by_owner={"a/kv": 96})
    ],
    engines=[ENGINE],
    grants=4,
    recalls=2,
    overdue=1,
    refused_messages=0,
    reclaimed_pages=0,
    giveback_ms=[5.0, 150.0],
)


def test_the_names_are_those_that_were_published() -> None:
    families = {family.name: family for family in text_string_to_metric_families(render_status(STATUS))}
    names = {name + "_total" if family.type == "counter" else name for name, family in families.items()}
    assert names == set(METRIC_NAMES)
    assert len(METRIC_NAMES) == 32


def test_the_values_are_the_status() -> None:
    text = render_status(STATUS)
    for line in (
        'polder_owner_pages{device="cpu:0",engine="a",use="kv"} 96.0',
        'polder_engine_borrowed_units{engine="a"} 2.0',
        'polder_engine_prefix_hits_tokens_total{engine="a"} 75.0',
        'polder_giveback_seconds_bucket{le="0.01"} 1.0',
        "polder_overdue_recalls_total 1.0",
    ):
        assert line in text
