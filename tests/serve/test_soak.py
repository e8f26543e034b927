"""The soak of a fleet finds what it looks for: wrong tokens, refused requests, memory that stays busy."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace

from polder.bench.harness.engines import fleet_toml
from tests.bench.fakes import no_waiting
from tests.serve.fakes import canned_status, engine_status
from tests.serve.soak import MODELS, PROMPTS, Report, Traffic, busy_parts, engines

RIGHT = [1, 2, 3]


def told(answer: httpx.Response) -> Report:
    """What is reported of one request that is answered so."""
    report = Report(minutes=1.0, seed=1)
    expected = {name: [RIGHT] * PROMPTS for name in MODELS}

    async def ask() -> None:
        traffic = Traffic(report, "http://fleet", Path("unused"), expected)
        await traffic._http.aclose()
        traffic._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: answer))
        await traffic.ask("a", 0)
        await traffic._http.aclose()

    asyncio.run(ask())
    return report


def tokens(ids: list[int]) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"token_ids": ids}]})


@pytest.mark.parametrize(
    ("answer", "answers", "wrong", "busy", "problems"),
    [
        (tokens(RIGHT), 1, 0, 0, 0),
        (tokens([1, 2, 4]), 1, 1, 0, 1),
        (httpx.Response(503, headers={"retry-after": "5"}), 0, 0, 1, 0),
        (httpx.Response(503), 0, 0, 0, 1),
        (httpx.Response(500), 0, 0, 0, 1),
    ],
)
def test_an_answer_is_right_or_a_problem(
    answer: httpx.Response, answers: int, wrong: int, busy: int, problems: int
) -> None:
    report = told(answer)
    assert (report.answers, report.wrong_answers, report.busy_503) == (answers, wrong, busy)
    assert len(report.problems) == problems


def test_what_is_busy_at_rest_is_named() -> None:
    resting = {"busy_units": 1, "waiting_units": 0, "stats": {}}
    status = replace(canned_status(), engines=[engine_status("a", **resting), engine_status("b", **resting)])
    assert busy_parts(status) == [], "the null block is always in use"
    busy = engine_status("b", **resting | {"busy_units": 2, "state": "silent", "stats": {"running_requests": 1.0}})
    assert busy_parts(replace(status, engines=[busy])) == ["b busy_units 2", "b running_requests 1", "b is silent"]


def test_the_fleet_has_208_mib_and_both_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_waiting(monkeypatch)
    fleet = tomllib.loads(fleet_toml(engines(tmp_path), 1234))
    assert fleet["memory"]["budget"] == 208 << 20
    assert [model["name"] for model in fleet["model"]] == ["a", "b"]
    assert all(model["weights"] == "elastic" and model["tiers"] for model in fleet["model"])
