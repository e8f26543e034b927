"""The demo asks all arms the same, shows only what its runs support, and draws both runs on one time axis."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from polder.bench.harness.driver import ClosedLoop, OpenLoop, RequestRecord, Tally, measured_turns
from polder.bench.harness.timeline import MemorySample, Timeline
from polder.bench.report.result import read_result, write_result
from polder.demo import arms
from polder.demo.__main__ import PANELS
from polder.demo.arms import BUDGET_BYTES, LONGEST, Seen, make_arm
from polder.demo.figures import tiles, to_result
from polder.demo.load import CHAT, DOCS, Chat
from polder.demo.picture import draw
from polder.demo.report import FLEET, page, print_summary
from polder.serve.schema import read_tables


class Words:
    """A tokenizer with an id for each word."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages)

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[self.ids.setdefault(word, len(self.ids)) for word in text.split()])

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) + "<|im_end|> and more"


def seen(first_token_s: float, *, ids: int = 5, memory: bool = True) -> Seen:
    def record(key: str, at_s: float) -> RequestRecord:
        tokens = [at_s + first_token_s, at_s + first_token_s + 0.1]
        return RequestRecord(
            key=key, scheduled_s=at_s, sent_s=at_s, token_s=tokens, end_s=tokens[-1], prompt_tokens=64, output_ids=[ids]
        )

    half = BUDGET_BYTES // 2
    samples = [
        MemorySample(t_s=t / 5, free_bytes=0, held_bytes={DOCS: half + t, CHAT: half - t}, busy_bytes={DOCS: half})
        for t in range(100 if memory else 0)
    ]
    records = {model: [record(f"{model} {n}", n) for n in range(12)] for model in (DOCS, CHAT)}
    return Seen(records=records, memory=samples, wall_s=20.0, timeline=Timeline(giveback_ms={CHAT: [12.0]}))


def test_every_arm_is_asked_the_same_and_each_reader_begins_with_a_text_of_its_own() -> None:
    words = Words()
    first, again = Chat(words).workloads(), Chat(words).workloads()
    assert first == again
    readers, visitors = first[DOCS], first[CHAT]
    assert isinstance(readers, ClosedLoop)
    assert isinstance(visitors, OpenLoop)
    begins = [msgspec.json.decode(user[0].body)["prompt"][:40] for user in readers.users]
    assert len({tuple(begin) for begin in begins}) == len(begins)
    for user in readers.users:
        prompts = [msgspec.json.decode(turn.body)["prompt"] for turn in user]
        for before, after in pairwise(prompts):
            assert after[: len(before)] == before, "a turn continues the conversation"
    keys = [turn.key for load in (readers.users, [visitors.turns]) for of in load for turn in of]
    assert len(set(keys)) == len(keys) == sum(measured_turns(load) for load in first.values())


def test_a_time_whose_interval_holds_one_is_no_tile() -> None:
    quicker, equal = (
        to_result({"stock": seen(2.0), "polder": seen(0.5)}, {}),
        to_result({"stock": seen(0.5), "polder": seen(0.5)}, {}),
    )
    assert [value for value, _ in tiles(quicker)] == ["0.50 s", "0.50 s", "0 of 24"]
    assert [value for value, _ in tiles(equal)] == ["0 of 24"]
    slower = to_result({"stock": seen(0.5), "polder": seen(2.0)}, {})
    assert [value for value, _ in tiles(slower)][:2] == ["2.00 s", "2.00 s"], "what is worse is shown, too"


def test_answers_with_other_tokens_are_counted() -> None:
    result = to_result({"stock": seen(1.0), "polder": seen(1.0, ids=6)}, {})
    assert tiles(result) == [("24 of 24", "answers with other tokens than stock vLLM's")]


def test_the_page_shows_both_runs_and_ends_with_the_readers_own_models(tmp_path: Path) -> None:
    runs = {"stock": seen(2.0), "polder": seen(0.5)}
    result = to_result(runs, {"all": 1.0})
    picture = draw({PANELS[arm]: runs[arm] for arm in ("stock", "polder")})
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert all(title in picture for title in PANELS.values())
    shown = page(result, picture, runs["polder"].records[DOCS], Chat(Words()))
    assert shown.index("Who holds the memory") < shown.index("Now with your models")
    assert "5</td>" in shown
    assert "and more" not in shown, "an answer ends where the model ended it"
    assert shown.rstrip().endswith("</pre>\n</body>\n</html>")
    with (tmp_path / "terminal").open("w") as file:
        print_summary(Console(file=file, width=100), result)
    assert "0 of 24" in (tmp_path / "terminal").read_text()
    write_result(result, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result


def test_a_run_without_a_look_at_the_memory_is_drawn() -> None:
    ElementTree.fromstring(draw({"empty": seen(1.0, memory=False)}))


def test_the_fleet_file_on_the_page_is_one() -> None:
    import tomllib

    assert [model.name for model, _ in read_tables(tomllib.loads(FLEET)).models] == [DOCS, CHAT]


def test_the_budget_holds_the_readers_texts_and_its_half_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(arms, "ensure_checkpoint", lambda source, folder: folder)
    arm = make_arm("stock", tmp_path, tmp_path)
    tokens = {engine.name: engine.blocks * 32 for engine in arm.engines}
    assert tokens[DOCS] == tokens[CHAT]
    assert 6 * LONGEST[DOCS] > 1.5 * tokens[DOCS]
    assert 6 * LONGEST[DOCS] < 2 * tokens[DOCS]
    assert arms._GAUGE.search('# HELP\nvllm:kv_cache_usage_perc{engine="0",model_name="docs"} 0.25\n')[1] == "0.25"  # type: ignore[index]
    assert Tally().ended == 0
