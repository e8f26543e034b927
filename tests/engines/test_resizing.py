"""What the engine core does with grants and recalls, and when its workers cannot do what the broker granted."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from polder import metrics
from polder.broker.wire import Grant, Grown, Recall, Returned
from polder.engines.vllm.core.elastic import ElasticCore
from polder.engines.vllm.core.resident import ResidentWeights
from polder.engines.vllm.core.resizing import Resizing
from polder.engines.vllm.core.subsystem import Subsystem, UnitPages
from polder.engines.vllm.core.transfers import Transfers


class Workers:
    """Two ranks, of which the second one fails to map."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        self.calls: list[str] = []

    def collective_rpc(self, function: Any, args: tuple[Any, ...] = ()) -> list[str]:
        self.calls.append(function.__name__)
        return self.errors if function.__name__ == "map_units" else ["", ""]


class Part(Subsystem):
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def on_mapped(self, pages: UnitPages) -> None:
        self.events.append(f"on_mapped {sorted(pages)}")


def resizing_with(errors: list[str], sent: list[Any]) -> tuple[Resizing, Workers, list[int]]:
    workers, offered = Workers(errors), list[int]()
    resizing = Resizing(
        SimpleNamespace(unmapped=lambda n: list(range(5, 5 + n)), offer=offered.extend),  # type: ignore[arg-type]
        SimpleNamespace(pages_per_unit=1, devices=["cpu:0", "cpu:0"]),  # type: ignore[arg-type]
        rpc=lambda function, *args: workers.collective_rpc(function, args),
        send=sent.append,
        subsystems=[Part(workers.calls)],
        transfers=Transfers(),
        weights=ResidentWeights(),
        counters=metrics.zeros(metrics.CORE),
    )
    resizing.generation = 1
    return resizing, workers, offered


def test_a_failed_map_gives_the_grant_back() -> None:
    sent: list[Any] = []
    resizing, workers, offered = resizing_with(["", "rank 1: out of memory"], sent)
    resizing.grow(Grant(lease=7, use="kv", units=2, pages=[[1, 2], [3, 4]]))
    assert sent == [Returned(lease=7, use="kv", pages=[[1, 2], [3, 4]])]
    assert offered == [], "no block may be used whose pages are not mapped on every rank"
    assert workers.calls == ["map_units", "unmap_units"], "the rank that did map must undo it"
    assert resizing.pages == {}


def test_a_grant_is_offered_only_after_every_rank_has_mapped_it() -> None:
    sent: list[Any] = []
    resizing, workers, offered = resizing_with(["", ""], sent)
    resizing.grow(Grant(lease=8, use="kv", units=2, pages=[[1, 2], [3, 4]]))
    assert sent == [Grown(lease=8)]
    assert workers.calls == ["map_units", "on_mapped [5, 6]"]
    assert offered == [5, 6]
    assert resizing.pages == {5: [[1], [3]], 6: [[2], [4]]}


def test_grants_and_recalls_go_to_the_part_that_has_that_use() -> None:
    sent: list[Any] = []
    told: list[tuple[str, str]] = []
    elastic: Any = ElasticCore.__new__(ElasticCore)
    elastic._resizing, _, _ = resizing_with(["", ""], sent)
    elastic._resizing.shrink = lambda recall: told.append(("shrink", recall.use))
    elastic._weights = SimpleNamespace(
        on_grant=lambda message, *_: told.append(("grant", message.use)),
        on_recall=lambda message, *_: told.append(("recall", message.use)),
    )
    elastic._report = lambda now: None
    elastic._subsystems = []
    elastic.link = SimpleNamespace(
        inbox=deque(
            [
                Grant(lease=1, use="weights", units=1, pages=[[9], [9]]),
                Grant(lease=2, use="kv", units=1, pages=[[1], [3]]),
                Recall(lease=3, use="kv", units=1, deadline_s=1.0),
                Recall(lease=4, use="weights", units=1, deadline_s=1.0),
            ]
        )
    )
    elastic.on_wake()
    assert told == [("grant", "weights"), ("recall", "weights"), ("shrink", "kv")]
    assert sent == [Grown(lease=2)]
    assert elastic._resizing.pages == {5: [[1], [3]]}
