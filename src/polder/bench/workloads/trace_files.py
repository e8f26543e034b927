"""Trace files of users: what each request or conversation in them asks for, and when.

    mooncake   a JSON object a line: timestamp, input_length, output_length, hash_ids (`vllm bench serve` calls it
               timed_trace). Equal ids stand for equal blocks of a prompt. No text
    custom     a JSON object a line: prompt (a text), perhaps output_tokens
    sharegpt   conversations: a JSON list of them, or one a line, each with conversations (from, value) or messages
               (role, content)

The format is recognised from the first line. A `timestamp` and a `model` may stand in any of them. A file that ends in
.zst is unpacked.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec

from polder.errors import ConfigError

__all__ = ["FORMATS", "Blocks", "Conversation", "Entry", "Message", "read_trace"]

Length = Annotated[int, msgspec.Meta(ge=1)]
Time = Annotated[float, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct, kw_only=True):
    timestamp: Time | None = None
    model: str | None = None


class _Mooncake(_Line, kw_only=True):
    timestamp: Time
    input_length: Length
    output_length: Length
    hash_ids: list[int] | None = None


class _Custom(_Line, kw_only=True):
    prompt: Annotated[str, msgspec.Meta(min_length=1)]
    output_tokens: Length | None = None


class _Said(msgspec.Struct, kw_only=True):
    """One turn, as ShareGPT or as OpenAI's chat API writes it."""

    speaker: str | None = msgspec.field(default=None, name="from")
    value: str | None = None
    role: str | None = None
    content: str | None = None


class _Conversation(_Line, kw_only=True):
    conversations: list[_Said] | None = None
    messages: list[_Said] | None = None


FORMATS: dict[str, tuple[type[_Line], str]] = {
    "mooncake": (
        _Mooncake,
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}',
    ),
    "custom": (_Custom, '{"prompt": "What is a polder?", "output_tokens": 64}'),
    "sharegpt": (
        _Conversation,
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    ),
}
"""Name -> what a line must be, and an example."""
_KEYS = {"input_length": "mooncake", "prompt": "custom", "conversations": "sharegpt", "messages": "sharegpt"}
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "tool"), None),
}
"""Who speaks -> the role for a chat template; None: the same."""
_BETWEEN = re.compile(r"[\s,]*")
"""What may stand between two entries of a list."""


class Blocks(msgspec.Struct, frozen=True):
    """A prompt of which only the length is known, and which blocks it shares with others."""

    input_tokens: int
    hash_ids: tuple[int, ...] | None
    """None: it shares nothing."""


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One request, or one conversation."""

    line: int
    where: str
    """The file and the line, for errors."""
    model: str | None
    at: float | None
    """In the file's unit of time."""
    asked: Blocks | str | Conversation
    output_tokens: int | None
    """None: of a conversation, whose replies say it, and where a prompt has none."""


def read_trace(path: Path, form: str = "") -> list[Entry]:
    """All entries of a file, in its order. `form`: one of FORMATS; empty: as its first line looks.

    Raises ConfigError with the line and what is expected there.
    """
    entries = []
    try:
        with _opened(path) as file:
            for line, text in _objects(file, path):
                where = f"{path}:{line}"
                form = form or _recognised(text, where)
                entries.append(_entry(text, form, line, where))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: save it as such") from error
    if not entries:
        raise ConfigError(f"{path} has no request in it")
    return entries


def _opened(path: Path) -> IO[str]:
    if path.suffix != ".zst":
        return path.open(encoding="utf-8-sig")
    import zstandard

    try:
        with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as raw:
            return io.StringIO(raw.read().decode("utf-8-sig"))
    except zstandard.ZstdError as error:
        raise ConfigError(f"{path} cannot be unpacked: {error}") from error


def _objects(file: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    """(line, JSON text) of each entry: of a list, or of lines. Empty lines are passed over."""
    for number, line in enumerate(file, start=1):
        if line.lstrip().startswith("["):
            yield from _listed(line + file.read(), number, path)
            return
        if line.strip():
            yield number, line


def _listed(text: str, line: int, path: Path) -> Iterator[tuple[int, str]]:
    """Entries of a JSON list that begins in this line."""
    decoder, at, counted = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        between = _BETWEEN.match(text, at)
        at = between.end() if between else at
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            wrong = line + text.count("\n", at, error.pos)
            raise ConfigError(f"{path}:{wrong}: {error.msg}: the list of conversations is not JSON there") from None
        yield line, text[at:end]
        at = end


def _recognised(text: str, where: str) -> str:
    try:
        keys: Any = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}; {_expected()}") from None
    found = [form for key, form in _KEYS.items() if isinstance(keys, dict) and key in keys]
    if not found:
        raise ConfigError(f"{where}: of no known format; {_expected()}")
    return found[0]


def _expected(form: str = "") -> str:
    return "expected is a line such as " + " or ".join(FORMATS[one][1] for one in ([form] if form else FORMATS))


def _entry(text: str, form: str, number: int, where: str) -> Entry:
    try:
        line: Any = msgspec.json.decode(text, type=FORMATS[form][0])
        asked, tokens = _asked(line)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}; {_expected(form)}") from None
    return Entry(line=number, where=where, model=line.model, at=line.timestamp, asked=asked, output_tokens=tokens)


def _asked(line: _Line) -> tuple[Blocks | str | Conversation, int | None]:
    """Raises ValueError when a conversation is not one."""
    if isinstance(line, _Mooncake):
        ids = None if line.hash_ids is None else tuple(line.hash_ids)
        return Blocks(line.input_length, ids), line.output_length
    if isinstance(line, _Custom):
        return line.prompt, line.output_tokens
    assert isinstance(line, _Conversation)
    said = line.conversations if line.conversations is not None else line.messages
    if said is None:
        raise ValueError("neither conversations nor messages")
    return tuple(map(_message, said)), None


def _message(said: _Said) -> Message:
    role, content = said.speaker or said.role, said.content if said.value is None else said.value
    if role is None or role not in _ROLES:
        raise ValueError(f"a message from {role!r}, who is none of {', '.join(_ROLES)}")
    if content is None:
        raise ValueError("a message without a text")
    return Message(_ROLES[role] or role, content)
