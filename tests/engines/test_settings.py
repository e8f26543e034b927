"""How an engine is configured: what is stock, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from polder.engines.vllm.settings import read_settings
from polder.errors import ConfigError


def test_nothing_configured_is_stock() -> None:
    assert read_settings({}, "m", {}) is None
    assert read_settings({"other": 1}, "m", {"PATH": "/bin"}) is None


def test_environment_and_additional_config_say_the_same() -> None:
    environment = {
        "POLDER_BROKER": "/run/b",
        "POLDER_ENGINE": "a",
        "POLDER_KV_FLOOR": "64MiB",
        "POLDER_KV_SHARE": "1GiB",
        "POLDER_TBT_GOAL": "200ms",
    }
    sizes = {"kv_floor": "64MiB", "kv_share": "1GiB"}
    additional = {"polder": {"broker": "/run/b", "engine": "a", "tbt_goal": 0.2, **sizes}}
    assert read_settings({}, "m", environment) == read_settings(additional, "m", {})


def test_the_environment_wins() -> None:
    settings = read_settings({"polder": {"broker": "/run/b", "engine": "x"}}, "m", {"POLDER_ENGINE": "y"})
    assert settings is not None
    assert (settings.engine, settings.broker) == ("y", Path("/run/b"))


def test_the_name_defaults_to_the_model() -> None:
    settings = read_settings({}, "llama", {"POLDER_KV_BUDGET": "1GiB"})
    assert settings is not None
    assert (settings.engine, settings.kv_budget_bytes, settings.broker) == ("llama", 1 << 30, None)


@pytest.mark.parametrize(
    ("additional", "environment", "words"),
    [
        ({"polder": {"brokr": "/run/b"}}, {}, "unknown"),
        ({"polder": "yes"}, {}, "must be an object"),
        ({}, {"POLDER_KV_FLOOR": "1GiB"}, "neither POLDER_BROKER nor POLDER_KV_BUDGET"),
        ({}, {"POLDER_BROKER": "/run/b", "POLDER_KV_BUDGET": "1GiB"}, "exclude each other"),
        ({}, {"POLDER_KV_BUDGET": "lots"}, "POLDER_KV_BUDGET: cannot read 'lots'"),
        ({}, {"POLDER_KV_BUDGET": "1GiB", "POLDER_TBT_GOAL": "0ms"}, "POLDER_TBT_GOAL: '0ms': write a time above 0"),
        ({}, {"POLDER_KV_BUDGET": "1GiB", "POLDER_TBT_GOAL": "fast"}, "POLDER_TBT_GOAL: cannot read 'fast'"),
        ({}, {"POLDER_BROKER": "/" + "x" * 120}, "107"),
    ],
)
def test_a_bad_setting_says_what_is_wrong(
    additional: dict[str, object], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings(additional, "m", environment)


BUDGET = {"POLDER_KV_BUDGET": "64MiB"}


def test_tiers_come_in_their_own_order_and_the_host_needs_a_size() -> None:
    both = read_settings({}, "m", BUDGET | {"POLDER_TIERS": "host, peer", "POLDER_HOST": "8MiB"})
    assert both is not None
    assert both.tiers == ("peer", "host")
    assert both.host_bytes == 8 << 20
    with pytest.raises(ConfigError, match="POLDER_HOST"):
        read_settings({}, "m", BUDGET | {"POLDER_TIERS": "host"})
    with pytest.raises(ConfigError, match="POLDER_HOST"):
        read_settings({}, "m", BUDGET | {"POLDER_TIERS": "peer", "POLDER_HOST": "8MiB"})
    with pytest.raises(ConfigError, match="known are peer, host, disk"):
        read_settings({}, "m", BUDGET | {"POLDER_TIERS": "tape"})


DISKS = {"POLDER_TIERS": "disk,host", "POLDER_HOST": "8MiB", "POLDER_DISKS": "/mnt/a:1GiB, /mnt/b:512MiB"}


def test_disks_have_paths_and_sizes_and_come_behind_the_host() -> None:
    settings = read_settings({}, "m", BUDGET | DISKS | {"POLDER_DISK_WRITES": "2GiB", "POLDER_DISK_IO": "aio"})
    assert settings is not None
    assert settings.tiers == ("host", "disk")
    assert settings.disks == (("/mnt/a", 1 << 30), ("/mnt/b", 512 << 20))
    assert (settings.disk_writes_bytes, settings.disk_io) == (2 << 30, "aio")
    plain = read_settings({}, "m", BUDGET | DISKS)
    assert plain is not None
    assert (plain.disk_writes_bytes, plain.disk_io) == (None, "threads")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"POLDER_DISKS": ""}, "POLDER_DISKS"),
        ({"POLDER_TIERS": "host"}, "POLDER_DISKS"),
        ({"POLDER_TIERS": "disk", "POLDER_HOST": ""}, "is written from the tier"),
        ({"POLDER_DISKS": "mnt:1GiB"}, "an absolute path and a size"),
        ({"POLDER_DISKS": "/mnt/a"}, "an absolute path and a size"),
        ({"POLDER_DISKS": "/mnt/a:much"}, "POLDER_DISKS: /mnt/a"),
        ({"POLDER_DISK_IO": "magic"}, "'threads'"),
    ],
)
def test_disks_that_cannot_be_meant_are_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings({}, "m", BUDGET | DISKS | wrong)


@pytest.mark.parametrize("bad", [{"POLDER_LINKS": "host=fast"}, {"POLDER_FAULTS": "fail=yes"}])
def test_bad_links_and_faults_are_refused_at_once(bad: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="write"):
        read_settings({}, "m", BUDGET | bad)
