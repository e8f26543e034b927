"""From trace files to requests: prompts share what the traces say, nothing is left out in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.bench.harness.driver import Turn, turns_of
from polder.bench.workloads.models import ModelRecipe
from polder.bench.workloads.replays import LEFT_OUT, Pace, Part, Replay, Served, make_replay, read_parts
from polder.bench.workloads.trace_files import Blocks, Conversation, Entry, Message
from polder.bench.workloads.words import Words
from polder.errors import ConfigError
from tests.bench.fakes import words_of
from tests.conftest import examples

TINY = ModelRecipe(name="words", family="llama", layers=1, vocab=600)
WORDS = words_of(TINY)


def entry(asked: Blocks | str | Conversation, *, line: int = 1, at: float | None = None, **more: Any) -> Entry:
    return Entry(line=line, where=f"f:{line}", asked=asked, at=at, **({"model": None, "output_tokens": 4} | more))


def replayed(*entries: Entry, longest: int = 1 << 20, **pace: Any) -> Replay:
    served = {"chat": Served(words=WORDS, longest=longest)}
    return make_replay([Part(model="chat", entries=entries)], served, Pace(**pace))


def prompts(replay: Replay) -> list[list[int]]:
    return [prompt_of(turn) for turn in turns_of(replay.loads["chat"])]


def prompt_of(turn: Turn) -> list[int]:
    prompt: list[int] = msgspec.json.decode(turn.body)["prompt"]
    return prompt


def talk(*texts: str) -> Conversation:
    return tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


ids = st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=5)


@examples(60)
@given(ids, ids, ids, st.integers(1, 40), st.data())
def test_equal_hash_ids_give_equal_prefixes_and_no_more(
    shared: list[int], one: list[int], other: list[int], block: int, data: st.DataObject
) -> None:
    both, lengths = [shared + one, shared + other], []
    for of in both:
        lengths.append(data.draw(st.integers((len(of) - 1) * block + 1, len(of) * block)))
    found = [WORDS.blocks(of, block, tokens=n, salt=0) for of, n in zip(both, lengths, strict=True)]
    assert [len(prompt) for prompt in found] == lengths
    same = min(*lengths, len(shared) * block)
    assert found[0][:same] == found[1][:same]
    for prompt in found:
        assert min(prompt) >= 3, "no special token"
        assert max(prompt) < TINY.vocab
    # Blocks of other ids are others: of 20 tokens drawn from 597 not all are the same.
    if one[0] % (1 << 64) != other[0] % (1 << 64) and min(lengths) >= same + 20 and block >= 20:
        assert found[0][same : same + 20] != found[1][same : same + 20]


def test_prompts_of_a_trace_never_change() -> None:
    """Results of different days are comparable only while this holds."""
    assert WORDS.blocks([46], 512, tokens=4, salt=0) == [62, 132, 282, 533]


@examples(40)
@given(st.sampled_from([16, 64, 512, 1024]), st.lists(st.integers(1, 9000), min_size=1, max_size=20))
def test_the_size_of_a_block_follows_from_lengths_and_ids(block: int, lengths: list[int]) -> None:
    lengths.append(8 * block)  # a line that tells
    entries = [entry(Blocks(n, tuple(range(-(-n // block)))), line=line) for line, n in enumerate(lengths)]
    assert [len(prompt) for prompt in prompts(replayed(*entries, minutes=99))] == lengths
    from polder.bench.workloads.replays import block_tokens_of

    assert block_tokens_of(entries, 0) == block


def test_ids_that_do_not_fit_a_length_are_refused_with_the_line() -> None:
    good, bad = entry(Blocks(1000, (1, 2))), entry(Blocks(1000, (1, 2, 3)), line=2)
    with pytest.raises(
        ConfigError, match=r"f:2: 3 hash_ids do not fit input_length 1000; .*500 to 999.*--block-tokens"
    ):
        replayed(good, bad)
    with pytest.raises(ConfigError, match="f:1: 2 hash_ids of 16 tokens are less than input_length 1000"):
        replayed(good, block_tokens=16)
    with pytest.raises(ConfigError, match="f:1: a hash id stands for 600 to 65536 tokens: say --block-tokens N"):
        replayed(entry(Blocks(600, (1,))))


def test_prompts_without_ids_share_nothing_and_files_do_not_share_ids() -> None:
    unique = replayed(entry(Blocks(50, None)), entry(Blocks(50, None), line=2))
    first, second = prompts(unique)
    assert first[:16] != second[:16]
    part = Part(model="chat", entries=[entry(Blocks(50, (1,)))])
    two = make_replay([part, part], {"chat": Served(words=WORDS, longest=99)}, Pace())
    first, second = prompts(two)
    assert first[:16] != second[:16]


def test_a_conversation_asks_again_after_each_reply_with_all_that_was_said() -> None:
    replay = replayed(entry(talk("t9 t8", "t7 t6 t5", "t9", "t4")), think_s=3.0, speed=2.0)
    (user,) = replay.loads["chat"].users
    assert [(prompt_of(turn), turn.output_tokens) for turn in user] == [
        ([9, 8], 3),
        ([9, 8, 7, 6, 5, 9], 1),
    ]
    assert user[1].think_s == 1.5


def test_requests_are_due_at_the_times_of_their_lines_over_the_speed() -> None:
    entries = [entry("t9", line=n, at=at) for n, at in enumerate((9000, 5000, 6000))]
    users = replayed(*entries, speed=2.0).loads["chat"].users
    assert [turn.think_s for (turn,) in users] == [0.0, 0.5, 2.0]
    users = replayed(*entries, unit_s=1.0, minutes=1e6).loads["chat"].users
    assert [turn.think_s for (turn,) in users] == [0.0, 1000.0, 4000.0]


def test_requests_without_times_come_at_random_and_the_same_with_the_same_seed() -> None:
    entries = [entry("t9", line=n) for n in range(400)]

    def times(**pace: Any) -> list[float]:
        return [turn.think_s for (turn,) in replayed(*entries, minutes=1e6, **pace).loads["chat"].users]

    assert times(rate=4.0)[-1] == pytest.approx(100, rel=0.2)
    assert times(seed=1) == times(seed=1) != times(seed=2)


def test_lines_with_and_without_a_time_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="f:2: it has no timestamp, and the first one has"):
        replayed(entry("t9", at=1.0), entry("t9", line=2))


def test_what_is_left_out_is_counted() -> None:
    replay = replayed(
        entry("t9 " * 90, line=1, at=0),
        entry(talk("t9", "t8", "t7 " * 90, "t6"), line=2, at=0),
        entry(talk("t9"), line=3, at=0),
        entry("t9", line=4, at=0),
        entry("t9", line=5, at=700_000),
        longest=64,
    )
    assert replay.counts["chat"] == {
        "in_traces": 6,
        "played": 2,
        "longer_than_context": 2,
        "without_reply": 1,
        "beyond_limit": 1,
        "refused_by_chat_format": 0,
    }
    limited = replayed(*(entry("t9", line=n, at=n) for n in range(5)), requests=3).counts["chat"]
    assert (limited["played"], limited["beyond_limit"]) == (3, 2)
    with pytest.raises(ConfigError, match="nothing of the traces can be played"):
        replayed(entry("t9 " * 90), longest=64)


def test_a_reply_of_the_whole_context_is_played_and_one_more_token_is_not() -> None:
    counts = replayed(entry("t9 t9", output_tokens=62), entry("t9 t9", line=2, output_tokens=63), longest=64).counts[
        "chat"
    ]
    assert (counts["played"], counts["longer_than_context"]) == (1, 1)


def test_messages_that_the_chat_format_refuses_are_left_out() -> None:
    class Strict:
        all_special_ids, added_tokens_decoder, chat_template = (0,), (), "{{ raise_exception('roles') }}"

        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 0}

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            import jinja2

            raise jinja2.TemplateError("roles")

    part = Part(model="chat", entries=[entry("t9"), entry(Blocks(3, None), line=2)])
    counts = make_replay([part], {"chat": Served(words=Words(Strict()), longest=9)}, Pace()).counts["chat"]
    assert (counts["refused_by_chat_format"], counts["played"]) == (1, 1)


def test_every_count_has_its_words() -> None:
    counts = replayed(entry("t9")).counts["chat"]
    assert counts.keys() == {"in_traces", "played", *LEFT_OUT}


def trace(tmp_path: Path, *lines: dict[str, Any]) -> str:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"prompt": "t9"} | line) + "\n" for line in lines))
    return str(path)


def test_a_request_goes_to_the_model_of_its_line_or_of_its_file(tmp_path: Path) -> None:
    own = trace(tmp_path, {"model": "chat"}, {"model": "docs"})
    served = {name: Served(words=WORDS, longest=999) for name in ("chat", "docs")}

    def played(*traces: str, models: tuple[str, ...] = ("chat", "docs")) -> dict[str, int]:
        counts = make_replay(read_parts(traces, models), {name: served[name] for name in models}, Pace()).counts
        return {model: of["played"] for model, of in counts.items()}

    assert played(own) == {"chat": 1, "docs": 1}
    assert played(f"docs={own}") == {"chat": 0, "docs": 2}
    assert played(f"docs={own}", f"chat={own}") == {"chat": 2, "docs": 2}
    assert played(own, models=("docs",)) == {"docs": 2}, "the fleet has one model"


def test_a_model_that_the_fleet_has_not_is_refused(tmp_path: Path) -> None:
    models = ("chat", "docs")
    with pytest.raises(
        ConfigError, match=r"t.jsonl:2: the fleet has no model 'gpt-9', but chat, docs; or write MODEL="
    ):
        read_parts([trace(tmp_path, {"model": "chat"}, {"model": "gpt-9"})], models)
    with pytest.raises(ConfigError, match=r"t.jsonl:1: no model is named; write --trace MODEL=FILE"):
        read_parts([trace(tmp_path, {})], models)
    with pytest.raises(ConfigError, match=r"--trace gpt-9=.*: the fleet has no model 'gpt-9'"):
        read_parts([f"gpt-9={trace(tmp_path, {})}"], models)
    with pytest.raises(ConfigError, match="no trace: write --trace chat=FILE"):
        read_parts([], models)


def test_the_rate_and_the_model_of_a_part_are_what_is_given() -> None:
    part = Part(model="", entries=[entry("t9", model="docs")])
    served = {name: Served(words=WORDS, longest=999) for name in ("chat", "docs")}
    assert make_replay([part], served, Pace()).loads.keys() == {"docs"}
    assert make_replay([replace(part, model="chat")], served, Pace()).loads.keys() == {"chat"}
