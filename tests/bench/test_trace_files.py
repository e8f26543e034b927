"""Users' trace files: formats are recognised, and a wrong line is refused with its number and what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polder.bench.workloads.trace_files import Blocks, Message, read_trace
from polder.errors import ConfigError

MOONCAKE = {"timestamp": 3000, "input_length": 6, "output_length": 5, "hash_ids": [0, 7]}
CUSTOM = {"prompt": "What is a polder?", "output_tokens": 9}
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def written(tmp_path: Path, *lines: Any, name: str = "trace.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_line_of_each_format_is_read_as_what_it_asks(tmp_path: Path) -> None:
    (entry,) = read_trace(written(tmp_path, MOONCAKE))
    assert (entry.at, entry.asked, entry.output_tokens) == (3000, Blocks(6, (0, 7)), 5)
    (entry,) = read_trace(written(tmp_path, CUSTOM | {"model": "chat"}))
    assert (entry.model, entry.asked, entry.output_tokens) == ("chat", "What is a polder?", 9)
    conversation = (Message("user", "Hi"), Message("assistant", "Hello"))
    for line in ({"conversations": SAID}, {"messages": MESSAGES, "id": 7}):
        assert read_trace(written(tmp_path, line))[0].asked == conversation
        assert [one.asked for one in read_trace(written(tmp_path, [line, line]))] == [conversation] * 2


def test_a_prompt_without_hash_ids_is_one_that_shares_nothing(tmp_path: Path) -> None:
    line = {"timestamp": 0, "input_length": 6, "output_length": 5}
    assert read_trace(written(tmp_path, line))[0].asked == Blocks(6, None)


def test_empty_lines_and_a_byte_order_mark_are_passed_over_and_zst_is_unpacked(tmp_path: Path) -> None:
    import zstandard

    plain = written(tmp_path, "\ufeff", CUSTOM, "", CUSTOM)
    assert [entry.line for entry in read_trace(plain)] == [2, 4]
    packed = tmp_path / "trace.jsonl.zst"
    packed.write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    assert [entry.asked for entry in read_trace(packed)] == [entry.asked for entry in read_trace(plain)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([MOONCAKE, MOONCAKE | {"input_length": "long"}], r"jsonl:2: .*`\$.input_length`; .*\"input_length\": 6955"),
        ([MOONCAKE, MOONCAKE | {"output_length": 0}], r"jsonl:2: .*>= 1.*output_length"),
        ([MOONCAKE, {"input_length": 6, "output_length": 5}], "jsonl:2: .*missing.*timestamp"),
        ([CUSTOM, "", MOONCAKE], r"jsonl:3: .*`prompt`; expected is a line such as .*output_tokens"),
        ([CUSTOM, "{"], "jsonl:2: Input data was truncated; expected is a line such as"),
        ([{"text": "a"}], "jsonl:1: of no known format; expected is a line such as .* or .* or "),
        (["[{", '"conversations": [}'], r"jsonl:2: .*not JSON there"),
        (["[", json.dumps({"conversations": SAID}), ",", json.dumps({"conversations": [{"value": "a"}]})], "jsonl:4: "),
        ([{"conversations": [{"from": "martian", "value": "a"}]}], "jsonl:1: a message from 'martian'"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], "jsonl:1: Expected `str"),
        ([""], "has no request in it"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_and_what_is_expected(
    lines: list[Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_trace(written(tmp_path, *lines))


def test_a_format_that_is_named_is_not_guessed(tmp_path: Path) -> None:
    both = CUSTOM | MOONCAKE
    assert read_trace(written(tmp_path, both), "custom")[0].asked == CUSTOM["prompt"]
    assert read_trace(written(tmp_path, both), "mooncake")[0].asked == Blocks(6, (0, 7))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none.jsonl: No such file"):
        read_trace(tmp_path / "none.jsonl")
    for name, words in (("a.jsonl", "not UTF-8"), ("a.zst", "cannot be unpacked")):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=words):
            read_trace(tmp_path / name)
