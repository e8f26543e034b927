"""Layers whose weights stream while their model is computed in piecewise CUDA graphs (tests/rig): no graph holds their waits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from polder.broker.client import request
from polder.broker.wire import Sleep, Stream
from tests.engines.controls import LATE_COPIES, Switches
from tests.engines.harness import Broker, Engine, wait_for
from tests.engines.test_weights_graphs import LAYERS, PAGES, RECIPES, SEQUENCES, one_by_one

pytestmark = pytest.mark.engine

LIKE = "v2,async,uni,warmup,compiled,graphs"
RECIPE = RECIPES["a"]


@pytest.fixture
def broker() -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=PAGES).start()
        yield broker
        broker.stop()


@pytest.fixture
def switches(tmp_path: Path) -> Switches:
    return Switches(tmp_path)


@pytest.fixture
def served(broker: Broker, switches: Switches) -> Iterator[Engine]:
    settings = {
        "POLDER_BROKER": str(broker.socket),
        "POLDER_ENGINE": "a",
        "POLDER_WEIGHTS": "elastic",
        "POLDER_LINKS": "weights=40MB/s",
    }
    with switches.reaching_engines() as more:
        engine = Engine.start(
            "a",
            RECIPE,
            settings | more,
            like=LIKE,
            compilation_config={"cudagraph_mode": "PIECEWISE"},
            max_num_seqs=SEQUENCES,
        )
        yield engine
        engine.stop()


def stream(broker: Broker, segments: int) -> None:
    request(broker.socket, Stream(engine="a", segments=segments))
    wait_for(lambda: broker.engine("a").segments == segments, f"{segments} segments")


def test_layers_stream_between_the_pieces_with_stocks_tokens(
    served: Engine, broker: Broker, switches: Switches
) -> None:
    stock = Engine.start("stock", RECIPE, num_gpu_blocks_override=160)
    expected = one_by_one(stock)
    stock.stop()
    assert one_by_one(served) == expected
    for segments in (LAYERS - 3, LAYERS):
        stream(broker, segments)
        assert one_by_one(served) == expected
    graphs = served.llm.collective_rpc("graph_figures")[0]
    assert graphs["replayed"] > 100
    assert not graphs["host_calls"], "no graph holds a wait, which it would leave out when it is replayed"
    request(broker.socket, Sleep(engine="a"))
    wait_for(lambda: broker.engine("a").asleep, "a to sleep")
    assert one_by_one(served) == expected

    stream(broker, LAYERS - 3)
    with switches.on(LATE_COPIES, "a layer's weights are not awaited"):
        assert one_by_one(served) != expected
