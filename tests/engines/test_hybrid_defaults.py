"""A hybrid, most of whose layers see a sliding window, under all of vLLM's GPU defaults (tests/rig): tokens are stock's."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest

from tests.engines.harness import PAGE, SMALL_VOCABULARY, TINY, Broker, Engine, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine

HYBRID = dataclasses.replace(TINY, name="tiny-rig-gemma", family="gemma3", layers=3)
ASKED, LENGTHS = prompts(8, 150, seed=2, vocabulary=SMALL_VOCABULARY), [4, 40] * 4
"""Every other one ends early and leaves holes among the others."""
HOST_PAGES = 400


def test_blocks_of_windows_and_of_full_attention_move_and_come_back_from_a_tier() -> None:
    stock = Engine.start("stock", HYBRID, num_gpu_blocks_override=400)
    expected = tokens_of(stock.generate(ASKED, LENGTHS))
    stock.stop()
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=240, host_pages=HOST_PAGES).start()
        settings = {
            "POLDER_BROKER": str(broker.socket),
            "POLDER_ENGINE": "a",
            "POLDER_TIERS": "host",
            "POLDER_HOST": f"{HOST_PAGES * PAGE}B",
        }
        like = "v2,async,uni,warmup,compiled,graphs"
        engine = None
        try:
            engine = Engine.start("a", HYBRID, settings, like=like, max_num_seqs=16)
            floor = broker.engine("a").floor_units
            broker.resize("a", floor + 15)
            sizes = {12: floor, 16: floor + 15, 22: floor + 1, 26: floor + 5}
            events = {at: lambda units=units: broker.resize("a", units) for at, units in sizes.items()}
            assert tokens_of(engine.generate(ASKED, LENGTHS, events)) == expected
            wait_for(lambda: bool(engine.utility("polder_forget_local")), "no block to be in use")
            assert tokens_of(engine.generate(ASKED, LENGTHS)) == expected
            found = engine.utility("polder_check")
            assert found["migrated_blocks_total"] > 0
            assert found["tier_host_hit_tokens_total"] > 0
            assert found["tier_failed_loads_total"] == 0
        finally:
            if engine is not None:
                engine.stop()
            broker.stop()
