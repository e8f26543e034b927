"""Tiers in the fleet file, and what people see of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from polder.cli.view import render
from polder.errors import BudgetError, ConfigError
from polder.serve.fleet import load_fleet
from polder.serve.supervisor import FleetStatus
from tests.serve.fakes import canned_status
from tests.serve.test_fleet import MIB, model, write

__all__ = ["model"]

FLEET = """
[memory]
kv_budget = "320MiB"
device = "cpu:0"
{memory}
[[model]]
name = "a"
path = "{model}"
max_model_len = 4096
args = ["--block-size", "32"]
{a}
[[model]]
name = "b"
path = "{model}"
max_model_len = 4096
args = ["--block-size", "32"]
{b}
"""


def fleet(folder: Path, model: Path, memory: str = "", a: str = "", b: str = "") -> Any:
    return load_fleet(write(folder, FLEET.format(model=model, memory=memory, a=a, b=b)))


def test_a_model_with_tiers_gets_the_connector_and_its_quota(tmp_path: Path, model: Path) -> None:
    loaded = fleet(tmp_path, model, 'host = "100MiB"', 'tiers = ["host", "peer"]', 'lend = "64MiB"')
    first, second = loaded.models
    assert loaded.broker(Path("s")).devices == {"cpu:0": 320 * MIB, "host:0": 100 * MIB}
    assert "--kv-transfer-config" in first.arguments()
    assert "--kv-transfer-config" not in second.arguments()
    environment = first.environment(Path("s"))
    assert environment["POLDER_TIERS"] == "peer,host", "from the fastest to the slowest"
    assert int(environment["POLDER_HOST"]) == 100 * MIB
    assert second.environment(Path("s"))["POLDER_LEND"] == str(64 * MIB)
    assert second.environment(Path("s"))["POLDER_TIERS"] == ""


def test_what_nobody_asked_for_is_divided_equally_in_whole_pages(tmp_path: Path, model: Path) -> None:
    host = 'tiers = ["host"]'
    loaded = fleet(tmp_path, model, 'host = "101MiB"', host, host)
    assert [m.settings.host_bytes for m in loaded.models] == [50 * MIB, 50 * MIB]
    loaded = fleet(tmp_path, model, 'host = "101MiB"', f'{host}\nhost = "81MiB"', host)
    assert [m.settings.host_bytes for m in loaded.models] == [81 * MIB, 20 * MIB]


@pytest.mark.parametrize(
    ("memory", "a", "error", "words"),
    [
        ("", 'tiers = ["tape"]', ConfigError, "unknown 'tape'; known are peer, host, disk"),
        ("", 'tiers = ["host"]', BudgetError, "no host memory is left"),
        ('host = "10MiB"', 'tiers = ["host"]\nhost = "20MiB"', BudgetError, 'write host = "20MiB" or more'),
        ('host = "10MiB"', 'host = "5MiB"', ConfigError, 'add "host" to model a: tiers'),
        ("", 'args = ["--kv-transfer-config", "{}"]', ConfigError, "--kv-transfer-config does not belong"),
    ],
)
def test_each_mistake_is_named(
    tmp_path: Path, model: Path, memory: str, a: str, error: type[Exception], words: str
) -> None:
    text = FLEET if "args" not in a else FLEET.replace('args = ["--block-size", "32"]', "", 1)
    path = write(tmp_path, text.format(model=model, memory=memory, a=a, b=""))
    with pytest.raises(error, match=words):
        load_fleet(path)


def test_top_shows_tiers_what_is_lent_and_the_verdict() -> None:
    status = canned_status()
    tiers = {
        "tier_host_used_bytes": 64.0 * MIB,
        "tier_host_size_bytes": 128.0 * MIB,
        "tier_host_hit_tokens_total": 4096.0,
        "tier_host_load_seconds_total": 2.0,
        "tier_saved_prefill_seconds_total": 812.0,
        "tier_unread_bytes_total": 12.0 * 1024 * MIB,
        "tier_refused_loads_total": 3.0,
        "tier_disk_used_bytes": 96.0 * 1024 * MIB,
        "tier_disk_size_bytes": 100.0 * 1024 * MIB,
        "tier_disk_corrupt_blocks_total": 5.0,
        "tier_writing_pays": 1.0,
        "lent_offered_bytes": 8.0 * MIB,
        "lent_borrowed_bytes": 2.0 * MIB,
        "lent_borrowed_recalls_total": 7.0,
        "lent_recall_p99_seconds": 0.0004,
    }
    engines = [msgspec.structs.replace(status.engines[0], stats=tiers), *status.engines[1:]]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(FleetStatus(broker=msgspec.structs.replace(status, engines=engines), children=[])))
    console.file.close()
    text = console.export_text()
    assert re.search(r"a +disk +96.GiB +100.GiB +0 +0.B +0.B +5\b", text)
    assert "tiers saved 812 s of prefill, cost 2 s of copies, 12 GiB written never read, 3 loads refused" in text
    assert "a offers 8 MiB, 2 MiB of it are borrowed; 0.11 borrowed blocks taken back a second, p99 0.40 ms" in text
