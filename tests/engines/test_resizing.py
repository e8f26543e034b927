"""What the engine core does when its workers cannot do what the broker granted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from polder.broker.wire import Grant, Grown, Returned
from polder.engines.vllm.core.elastic import COUNTERS, ElasticCore
from polder.engines.vllm.rank.worker import Outcome


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
    elastic.counters = dict.fromkeys(COUNTERS, 0.0)
    offered: list[int] = []
    elastic.blocks = SimpleNamespace(unmapped=lambda n: list(range(5, 5 + n)), offer=offered.extend, offered=offered)  # type: ignore[assignment]
    elastic.link = SimpleNamespace(send=sent.append)  # type: ignore[assignment]
    return elastic


def test_a_failed_map_gives_the_grant_back() -> None:
    sent: list[Any] = []
    elastic = core_with(["", "rank 1: out of memory"], sent)
    elastic._grow(Grant(lease=7, units=2, pages=[[1, 2], [3, 4]]))
    assert sent == [Returned(lease=7, pages=[[1, 2], [3, 4]])]
    assert elastic.blocks.offered == [], "no block may be used whose pages are not mapped on every rank"  # type: ignore[attr-defined]
    assert elastic._core.model_executor.calls == ["map_units", "unmap_units"], "the rank that did map must undo it"
    assert elastic._pages == {}


def test_a_grant_is_offered_only_after_every_rank_has_mapped_it() -> None:
    sent: list[Any] = []
    elastic = core_with(["", ""], sent)
    elastic._grow(Grant(lease=8, units=2, pages=[[1, 2], [3, 4]]))
    assert sent == [Grown(lease=8)]
    assert elastic.blocks.offered == [5, 6]  # type: ignore[attr-defined]
    assert elastic._pages == {5: [[1], [3]], 6: [[2], [4]]}
