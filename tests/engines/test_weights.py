"""Weights that leave the device and come back on real engines: the tokens stay stock's, whoever gives to whom meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from polder.bench.workloads.models import ModelRecipe
from polder.broker.client import request
from polder.broker.wire import Sleep, Wake
from tests.engines.conftest import Stock
from tests.engines.harness import (
    MODELS,
    ORDINARY,
    PAGE,
    SMALL_A,
    SMALL_B,
    SMALL_VOCABULARY,
    Broker,
    Engine,
    prompts,
    tokens_of,
    wait_for,
)
from tests.engines.quantised import int8_attention

pytestmark = pytest.mark.engine

PROMPTS = prompts(4, 200, seed=51, vocabulary=SMALL_VOCABULARY)
LAYERS = SMALL_A.layers
RECIPES = {
    "a": SMALL_A,
    "b": SMALL_B,
    "moe": ModelRecipe(
        name="tiny-moe", family="qwen2_moe", layers=6, vocab=SMALL_VOCABULARY, seed=4, spread=0.06
    ).in_float32(),
}
COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
"""Traced by Dynamo as in production, without the C++ compiler that inductor needs."""


@pytest.fixture
def started() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def add(broker: Broker, name: str, more: dict[str, str] | None = None, **options: object) -> Engine:
        settings = {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": name, "POLDER_WEIGHTS": "elastic"}
        engines.append(Engine.start(name, RECIPES[name], settings | (more or {}), **{"like": ORDINARY} | options))
        return engines[-1]

    yield add
    for engine in engines:
        engine.stop()


@pytest.fixture
def broker() -> Iterator[Callable[..., Broker]]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        made: list[Broker] = []

        def make(pages: int, host_pages: int = 0) -> Broker:
            made.append(Broker(Path(folder) / "b", pages=pages, host_pages=host_pages).start())
            return made[0]

        yield make
        for each in made:
            each.stop()


@pytest.fixture(scope="module")
def expected(stock: Stock) -> dict[str, list[list[int]]]:
    return {name: stock(recipe, PROMPTS, 24) for name, recipe in RECIPES.items()}


def one_by_one(engine: Engine) -> list[list[int]]:
    return [tokens_of(engine.generate([prompt]))[0] for prompt in PROMPTS]


def conserved(broker: Broker) -> bool:
    device = broker.status().devices[0]
    return device.free_pages + sum(device.pages_by_owner.values()) == device.total_pages


@pytest.mark.parametrize(
    ("name", "options"), [("moe", {}), ("a", COMPILED)], ids=["eager, experts and biases", "compiled"]
)
def test_layers_taken_streamed_and_returned_in_mid_request_change_no_token(
    name: str,
    options: dict[str, object],
    broker: Callable[..., Broker],
    started: Callable[..., Engine],
    expected: dict[str, list[list[int]]],
) -> None:
    device = broker(900)
    a = started(device, name, **options)
    layers = device.engine(name).layers
    assert device.engine(name).segments == layers
    events = {
        3: lambda: a.utility("polder_give_up", 3),
        8: lambda: a.utility("polder_give_up", 2),
        12: lambda: request(device.socket, Wake(engine=name)),
        18: lambda: a.utility("polder_give_up", layers - 2),
    }
    for prompt, tokens in zip(PROMPTS, expected[name], strict=True):
        assert tokens_of(a.generate([prompt], events=dict(events))) == [tokens]
        request(device.socket, Wake(engine=name))
        wait_for(lambda: device.engine(name).segments == layers, "all layers to be back")
    with pytest.raises(Exception, match="weights cannot be replaced"):
        a.llm.collective_rpc("reload_weights")
    with pytest.raises(Exception, match="compute_weight_checksums does not work with elastic weights"):
        a.llm.collective_rpc("compute_weight_checksums")
    figures = a.utility("polder_check")
    assert figures["weights_loads_total"] > 10 * layers, "hardly anything was streamed: the test shows nothing"

    request(device.socket, Sleep(engine=name))
    wait_for(lambda: device.engine(name).asleep, "it to sleep")
    assert device.status().devices[0].pages_by_owner.get(f"{name}/weights", 0) == 0
    assert one_by_one(a) == expected[name]
    assert device.engine(name).segments == layers
    assert conserved(device)


def test_models_that_do_not_fit_together_take_turns_and_outlive_each_other(
    broker: Callable[..., Broker], started: Callable[..., Engine], expected: dict[str, list[list[int]]]
) -> None:
    # Pages of 256 KiB: weights are 16, KV floors 36. Neither can stream as much as the other lacks.
    device = broker(73)
    a, b = started(device, "a"), started(device, "b")
    assert device.engine("b").asleep, "there was no room for its weights beside a's"
    for _ in range(2):
        for engine, other in ((b, "a"), (a, "b")):
            assert one_by_one(engine) == expected[engine.name]
            assert device.engine(other).segments < device.engine(other).layers
            assert conserved(device)
    assert a.utility("polder_check")["wakes_total"] + b.utility("polder_check")["wakes_total"] >= 2
    reasons = [decision.reason for decision in device.status().decisions]
    assert any("an engine that wakes" in reason for reason in reasons)

    # One that is to give its weights up dies instead.
    processes = a.processes()
    os.kill(a.core_pid(), signal.SIGSTOP)
    killer = threading.Thread(target=lambda: kill_once(lambda: device.engine("a").state == "overdue", a))
    killer.start()
    assert one_by_one(b) == expected["b"], "b has waited for a's memory"
    killer.join()
    assert_gone(device, "a", processes)

    # One that gets its weights back dies in mid-copy: two seconds at this link's speed.
    a = started(device, "a", {"POLDER_LINKS": "weights=2MB/s"})
    processes = a.processes()
    a.submit(PROMPTS[0])
    kill_once(lambda: device.engine("a").segments == LAYERS, a)
    assert one_by_one(b) == expected["b"]
    assert_gone(device, "a", processes)


CLAIMANT = """
import sys
from pathlib import Path
from typing import Any
from polder.broker import wire
from polder.broker.transport import Channel
units = int(sys.argv[2])
channel = Channel(Path(sys.argv[1]), timeout_s=60)
channel.send(wire.Hello(engine="c", model="m", devices=["cpu:0"], page_bytes=0, pages_per_unit=1, unit_tokens=1, floor_units=1,
                        ceiling_units=units, share_units=0))
while True:
    message = channel.receive()
    if isinstance(message, wire.Welcome | wire.Grant):
        channel.send(wire.Grown(lease=message.lease))
    if isinstance(message, wire.Welcome):
        channel.send(wire.Demand(held_units=1, busy_units=1, waiting_units=units - 1, peak_units=units, cached_units=0,
                                 curve=[], urgent=True))
"""


@contextlib.contextmanager
def somebody_who_asks_for(device: Broker, pages: int) -> Iterator[None]:
    """An engine whose requests need so many pages, for as long as the context lasts."""
    with subprocess.Popen([sys.executable, "-c", CLAIMANT, str(device.socket), str(pages)]) as process:
        try:
            yield
        finally:
            process.kill()
    wait_for(lambda: all(e.engine != "c" for e in device.status().engines), "its pages to come back")


def kill_once(condition: Callable[[], bool], engine: Engine) -> None:
    wait_for(condition, "the moment to kill")
    os.kill(engine.core_pid(), signal.SIGKILL)


def assert_gone(device: Broker, name: str, processes: list[psutil.Process]) -> None:
    psutil.wait_procs(processes, timeout=120)
    wait_for(lambda: all(e.engine != name for e in device.status().engines), f"{name}'s memory to come back")
    assert conserved(device)
    assert not any(owner.startswith(f"{name}/") for owner in device.status().devices[0].pages_by_owner)


def test_what_sleeps_keeps_its_prefix_cache_in_the_tier_on_two_ranks(
    broker: Callable[..., Broker], started: Callable[..., Engine], expected: dict[str, list[list[int]]]
) -> None:
    device = broker(900, host_pages=400)
    settings = {"POLDER_TIERS": "host", "POLDER_HOST": f"{400 * PAGE}B"}
    a = started(device, "a", settings, like="async", tensor_parallel_size=2)
    assert one_by_one(a) == expected["a"]
    for _ in range(2):
        request(device.socket, Sleep(engine="a"))
        wait_for(lambda: device.engine("a").asleep, "a to sleep")
        with somebody_who_asks_for(device, 900):
            wait_for(lambda: device.engine("a").held_units == 1, "a's cache to go")
        answers = [a.generate([prompt])[0] for prompt in PROMPTS]
        assert tokens_of(answers) == expected["a"]
        assert all(answer.cached >= 128 for answer in answers), [answer.cached for answer in answers]
    figures = a.utility("polder_check")
    assert figures["tier_host_hit_tokens_total"] > 0
    assert figures["wakes_total"] == 2
    assert conserved(device)


def test_quantised_layers_stay_and_the_others_leave_and_return(
    broker: Callable[..., Broker], started: Callable[..., Engine]
) -> None:
    """vLLM's int8 layers on the CPU keep the address of their scales: moved, they would be read from freed memory.

    In bfloat16, for the int8 kernels that vLLM takes on a CPU with AMX have no float32.
    """
    model: Any = {"model": str(int8_attention(SMALL_A, MODELS)), "dtype": "bfloat16"}
    stock = Engine.start("stock", SMALL_A, num_gpu_blocks_override=200, **model)
    expected = one_by_one(stock)
    stock.stop()
    device = broker(900)
    a = started(device, "a", **model)
    assert one_by_one(a) == expected
    request(device.socket, Sleep(engine="a"))
    wait_for(lambda: device.engine("a").asleep, "it to sleep")
    assert one_by_one(a) == expected
    figures = a.utility("polder_check")
    assert figures["weights_resident_bytes"] > LAYERS * 128 * (256 + 768), "attention in int8"
    assert figures["wakes_total"] == 1
