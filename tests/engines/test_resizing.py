"""What the engine core does with grants and recalls, and when its workers cannot do what the broker granted."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from polder import metrics
from polder.broker.wire import Grant, Grown, Recall, Returned
from polder.engines.vllm.core.elastic import ElasticCore
from polder.engines.vllm.plans import Outcome


class Workers:
    """Two ranks, of which the second one fails to map."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        self.calls: list[str] = []

    def collective_rpc(self, function: Any, args: tuple[Any, ...] = ()) -> list[Outcome]:
        self.calls.append(function.__name__)
        failing = self.errors if function.__name__ == "map_units" else ["", ""]
        return [Outcome(seconds=0.0, error=error) for error in failing]


def core_with(errors: list[str], sent: list[Any]) -> ElasticCore:
    elastic = ElasticCore.__new__(ElasticCore)
    elastic._core = SimpleNamespace(model_executor=Workers(errors))
    elastic.lender = None
    elastic._generation = 1
    elastic._pages = {}
    elastic._hello = SimpleNamespace(pages_per_unit=1, devices=["cpu:0", "cpu:0"])  # type: ignore[assignment]
    elastic.counters = metrics.zeros(metrics.CORE)
    offered: list[int] = []
    elastic.blocks = SimpleNamespace(unmapped=lambda n: list(range(5, 5 + n)), offer=offered.extend, offered=offered)  # type: ignore[assignment]
    elastic.link = SimpleNamespace(send=sent.append)  # type: ignore[assignment]
    return elastic


def test_a_failed_map_gives_the_grant_back() -> None:
    sent: list[Any] = []
    elastic = core_with(["", "rank 1: out of memory"], sent)
    elastic._grow(Grant(lease=7, use="kv", units=2, pages=[[1, 2], [3, 4]]))
    assert sent == [Returned(lease=7, use="kv", pages=[[1, 2], [3, 4]])]
    assert elastic.blocks.offered == [], "no block may be used whose pages are not mapped on every rank"  # type: ignore[attr-defined]
    assert elastic._core.model_executor.calls == ["map_units", "unmap_units"], "the rank that did map must undo it"
    assert elastic._pages == {}


def test_a_grant_is_offered_only_after_every_rank_has_mapped_it() -> None:
    sent: list[Any] = []
    elastic = core_with(["", ""], sent)
    elastic._grow(Grant(lease=8, use="kv", units=2, pages=[[1, 2], [3, 4]]))
    assert sent == [Grown(lease=8)]
    assert elastic.blocks.offered == [5, 6]  # type: ignore[attr-defined]
    assert elastic._pages == {5: [[1], [3]], 6: [[2], [4]]}


def test_grants_and_recalls_go_to_the_part_that_has_that_use() -> None:
    sent: list[Any] = []
    told: list[tuple[str, str]] = []
    elastic = core_with(["", ""], sent)
    weights = SimpleNamespace(
        on_grant=lambda message, *_: told.append(("grant", message.use)),
        on_recall=lambda message, *_: told.append(("recall", message.use)),
    )
    elastic.weights = weights  # type: ignore[assignment]
    elastic._shrink = lambda recall: told.append(("shrink", recall.use))  # type: ignore[method-assign]
    elastic._report = lambda now: None  # type: ignore[method-assign]
    elastic._postponed, elastic.tiers, elastic._own_table = [], None, None
    elastic.link.inbox = deque(  # type: ignore[misc]
        [
            Grant(lease=1, use="weights", units=1, pages=[[9], [9]]),
            Grant(lease=2, use="kv", units=1, pages=[[1], [3]]),
            Recall(lease=3, use="kv", units=1, deadline_s=1.0),
            Recall(lease=4, use="weights", units=1, deadline_s=1.0),
        ]
    )
    elastic.on_wake()
    assert told == [("grant", "weights"), ("recall", "weights"), ("shrink", "kv")]
    assert sent == [Grown(lease=2)]
    assert elastic._pages == {5: [[1], [3]]}
