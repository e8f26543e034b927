"""Tiers on real engines: what comes back from a neighbour's memory or from the host is what was computed, whoever dies
meanwhile."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import Stock
from tests.engines.harness import A32, B32, ORDINARY, PAGE, Broker, Engine, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine

UNITS_A, UNITS_B, HOST_PAGES = 11, 40, 96
"""A unit of A is 8 pages, one of B 4; both hold 128 tokens. A's cache holds one conversation beside the one that runs."""
CONVERSATIONS = prompts(6, 300, seed=21)
LOAD_B = prompts(10, 330, seed=22)


def fixed(units: int, pages: int) -> dict[str, str]:
    size = f"{units * pages * PAGE}B"
    return {"POLDER_KV_FLOOR": size, "POLDER_KV_SHARE": size, "POLDER_KV_CEILING": size}


def start_a(broker: Broker, tiers: str = "peer,host", **more: str) -> Engine:
    settings = {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "a", "POLDER_TIERS": tiers, **more}
    return Engine.start(
        "a", A32, settings | {"POLDER_HOST": f"{HOST_PAGES * PAGE}B"} | fixed(UNITS_A, 8), like=ORDINARY
    )


def start_b(broker: Broker) -> Engine:
    settings = {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "b", "POLDER_LEND": f"{16 * 4 * PAGE}B"}
    return Engine.start("b", B32, settings | fixed(UNITS_B, 4), like=ORDINARY)


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=UNITS_A * 8 + UNITS_B * 4, host_pages=HOST_PAGES).start()
        yield broker
        broker.stop()


@pytest.fixture(scope="module")
def expected(stock: Stock) -> tuple[list[list[int]], list[list[int]]]:
    return stock(A32, CONVERSATIONS, 24), stock(B32, LOAD_B, 24)


@pytest.fixture(scope="module")
def engines(broker: Broker, expected: object) -> Iterator[dict[str, Engine]]:
    started = {"b": start_b(broker), "a": start_a(broker)}
    yield started
    for engine in started.values():
        engine.stop()


def figures(engine: Engine) -> dict[str, float]:
    """Checks all laws, and returns the counters."""
    found: dict[str, float] = engine.utility("polder_check")
    return found


def lends(engine: Engine) -> bool:
    return figures(engine)["lent_offered_bytes"] >= 12 * 4 * PAGE


def ask(engine: Engine, rounds: int = 1) -> list[list[int]]:
    return [tokens_of(engine.generate([p]))[0] for _ in range(rounds) for p in CONVERSATIONS]


def test_conversations_come_back_from_both_tiers_with_the_same_tokens(
    broker: Broker, engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    wait_for(lambda: lends(engines["b"]), "b to lend")
    time.sleep(1.1)  # a looks for lenders once a second
    answers = ask(engines["a"], rounds=3)
    assert answers == expected[0] * 3
    found = figures(engines["a"])
    assert found["tier_peer_hit_tokens_total"] > 0
    assert found["tier_host_hit_tokens_total"] > 0
    assert found["tier_failed_loads_total"] == 0
    assert figures(engines["b"])["lent_borrowed_bytes"] > 0
    lent = broker.status().devices[1].pages_by_owner
    assert lent == {"a/lent": HOST_PAGES}, "the host tier is booked, and no more of it than the quota"


def test_a_load_begins_while_another_prompt_fills_the_batch(
    engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    a = engines["a"]
    ask(a)
    before = figures(a)["tier_early_loads_total"]
    prompt = prompts(1, 600, seed=23)[0]  # three steps of a whole batch each
    _, answer = tokens_of(a.generate([prompt, CONVERSATIONS[0]]))
    assert figures(a)["tier_early_loads_total"] == before + 1
    assert answer == expected[0][0]


def test_a_lender_that_takes_back_all_the_time_costs_misses_and_no_token(
    engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    a, b = engines["a"], engines["b"]
    wait_for(lambda: lends(b), "b to lend")
    before = figures(b)["lent_borrowed_recalls_total"]
    answers_b: list[list[int]] = []
    assert ask(a) == expected[0]

    def burst() -> None:
        answers_b.extend(tokens_of(b.generate(LOAD_B)))

    assert tokens_of(a.generate(CONVERSATIONS, events={3: burst})) == expected[0]
    assert answers_b == expected[1], "the lender's own answers"
    assert figures(b)["lent_borrowed_recalls_total"] > before, "nothing borrowed was taken back: the test shows nothing"
    assert figures(a)["tier_peer_corrupt_blocks_total"] == 0


def test_a_killed_lender_is_a_miss_a_stopped_broker_holds_nobody_up_and_the_successor_lends_again(
    broker: Broker, engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    a = engines["a"]
    wait_for(lambda: lends(engines["b"]), "b to lend")
    assert ask(a) == expected[0]
    killed = tokens_of(a.generate(CONVERSATIONS, events={4: lambda: os.kill(engines["b"].core_pid(), signal.SIGKILL)}))
    assert killed == expected[0]
    started = time.monotonic()
    assert ask(a) == expected[0]
    unhindered = time.monotonic() - started
    engines["b"].stop()
    engines["b"] = start_b(broker)
    wait_for(lambda: lends(engines["b"]), "the new b to lend")
    time.sleep(1.1)

    # a's workers have not opened the new lender yet: without the broker each block to be stored there fails.
    before = figures(a)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        answers = ask(a, rounds=2)
        took = time.monotonic() - started
    finally:
        broker.process.send_signal(signal.SIGCONT)
    assert answers == expected[0] * 2
    # Twice as many requests. A wait for each block, which this is about, takes minutes.
    assert took < 30.0 + 6 * unhindered, "requests waited for a broker that is stopped"
    stopped = figures(a)
    assert stopped["tier_peer_failed_blocks_total"] > before["tier_peer_failed_blocks_total"], "the test shows nothing"

    def stores_again() -> bool:
        assert ask(a) == expected[0]
        return figures(a)["tier_peer_stored_bytes_total"] > stopped["tier_peer_stored_bytes_total"]

    wait_for(stores_again, "a to store at its lender again")


def test_a_killed_borrower_leaves_nothing_behind_at_its_lender(
    broker: Broker, engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    b = engines["b"]
    assert figures(b)["lent_borrowed_bytes"] > 0
    engines["a"].generate(CONVERSATIONS[:1])
    os.kill(engines["a"].core_pid(), signal.SIGKILL)
    assert [tokens_of(b.generate([p]))[0] for p in LOAD_B] == expected[1]
    wait_for(lambda: len(broker.status().engines) == 1, "a to be noticed")
    wait_for(lambda: figures(b)["lent_borrowed_bytes"] == 0, "b to have its blocks back")
    assert not broker.status().devices[1].pages_by_owner, "its host memory is free"
    engines["a"].stop()
    engines["a"] = start_a(broker)
    assert ask(engines["a"]) == expected[0]
