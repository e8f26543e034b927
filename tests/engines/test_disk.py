"""The disk tier on a real engine: what one run has written the next one finds, with the same tokens, whatever the disks do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from polder.diskstore.fsck import check_directory
from polder.diskstore.layout import usage_bytes
from polder.errors import ConfigError
from tests.engines.harness import A32, ORDINARY, PAGE, Engine, Output, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine

LIMIT = 48 << 20
"""Of each of two disks."""
ASKED = prompts(6, 300, seed=51)
"""Each has 9 to 11 blocks of half a MiB: together more than budget and host tier."""


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp(f"disk{n}") for n in range(2)]


def start(disks: list[Path], **settings: str) -> Engine:
    own = {
        "POLDER_KV_BUDGET": "24MiB",
        "POLDER_PAGE": f"{PAGE}B",
        "POLDER_TIERS": "host,disk",
        "POLDER_HOST": "12MiB",
        "POLDER_DISKS": ",".join(f"{disk}:{LIMIT}B" for disk in disks),
    }
    return Engine.start("d", A32, own | settings, like=ORDINARY)


def figures(engine: Engine) -> dict[str, float]:
    """Checks all laws, and returns the counters."""
    found: dict[str, float] = engine.utility("polder_check")
    return found


@pytest.fixture(scope="module")
def expected(disks: list[Path]) -> list[list[int]]:
    """Answers to prompts that nobody has asked before, from an engine that leaves their blocks on the disks."""
    engine = start(disks)
    try:
        answers = [engine.generate([prompt])[0] for prompt in ASKED]
        assert not any(answer.cached for answer in answers)
        # No other request comes: empty steps carry the rest.
        wait_for(lambda: figures(engine)["disk_spilled_blocks_total"] >= 50, "blocks to be written")
        found = figures(engine)
        assert found["disk_written_bytes_total"] >= 50 * (512 << 10)
        assert found["disk_disks_ok"] == len(disks)
    finally:
        engine.stop()
    assert all(usage_bytes(disk) <= LIMIT for disk in disks)
    assert not any(check_directory(disk)[0].problems for disk in disks)
    return tokens_of(answers)


def test_a_restarted_engine_hits_from_its_first_request_and_spoilt_pages_cost_no_token(
    disks: list[Path], expected: list[list[int]]
) -> None:
    engine = start(disks, POLDER_LINKS="disk=2GB/s")
    try:
        answers: list[Output] = [engine.generate([prompt])[0] for prompt in ASKED]
        assert tokens_of(answers) == expected
        assert all(answer.cached >= len(prompt) - 64 for answer, prompt in zip(answers, ASKED, strict=True))
        found = figures(engine)
        assert found["tier_disk_hit_tokens_total"] >= 0.8 * sum(map(len, ASKED))
        assert found["tier_failed_loads_total"] == 0
        slab = disks[0] / "slab"
        slab.write_bytes(bytes(slab.stat().st_size))  # in use, and every page of this disk is wrong now
        wait_for(lambda: bool(engine.utility("polder_forget_local")), "no block to be in use")
        assert tokens_of([engine.generate([prompt])[0] for prompt in ASKED]) == expected
        found = figures(engine)
        assert found["tier_failed_loads_total"] > 0
        assert found["tier_disk_corrupt_blocks_total"] > 0
    finally:
        engine.stop()
    assert all(usage_bytes(disk) <= LIMIT for disk in disks)


def test_a_directory_of_another_model_is_refused_with_a_message(disks: list[Path], expected: list[list[int]]) -> None:
    from polder.emulation.factory import Emulation
    from polder.engines.vllm.plans import DiskPlan
    from polder.engines.vllm.tiers.disk import OpenDisks

    none = Emulation(links="", faults="")
    plan = DiskPlan(
        disks=((str(disks[1]), LIMIT),),
        page_bytes=512 << 10,
        namespace="another",
        ranks=1,
        staged_pages=24,
        io="threads",
    )
    with pytest.raises(ConfigError, match="namespace"):
        OpenDisks(plan, 0, none)
    with pytest.raises(ConfigError, match="an engine with one rank"):
        OpenDisks(replace(plan, ranks=2), 1, none)
