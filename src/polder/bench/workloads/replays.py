"""Users' traces as workloads: which model gets which request of which file, when, and what is left out.

A request is due at the time of its line, whatever the server does (open loop). Without times, requests and
conversations begin at random (Poisson), and a conversation's next request comes some time after the reply to its last
one. Replies in prompts are those of the file, so all arms get the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polder.bench.harness.driver import ClosedLoop, Turn, greedy
from polder.bench.workloads.trace_files import Blocks, Conversation, Entry, Message, read_trace
from polder.bench.workloads.words import Words
from polder.errors import ConfigError

__all__ = ["LEFT_OUT", "Pace", "Part", "Replay", "Served", "block_tokens_of", "make_replay", "read_parts"]

LEFT_OUT = {
    "longer_than_context": "longer than the model's context",
    "without_reply": "conversations without a question and its reply",
    "refused_by_chat_format": "messages that the model's chat format refuses",
    "beyond_limit": "after the limit of minutes or requests",
}
"""Counts of a replay, and what they are."""
MOONCAKE_BLOCK_TOKENS, MOST_BLOCK_TOKENS = 512, 1 << 16
UNIQUE = 1 << 41
"""Blocks of prompts that share nothing have other salts than those with ids."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When requests come, how many, and what their lines do not say."""

    speed: float = 1.0
    """Times and pauses of the trace are divided by it."""
    rate: float = 1.0
    """Requests or conversations that begin in a second, for each file without times."""
    think_s: float = 1.0
    """Between a reply and the next request of its conversation."""
    unit_s: float = 1e-3
    """Of the file's times."""
    minutes: float = 10.0
    """Of the run: what begins later is left out."""
    requests: int | None = None
    """The most that are played."""
    output_tokens: int = 256
    """Of a prompt whose line does not say."""
    block_tokens: int = 0
    """Of one hash id; 0: as the lengths tell."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model of the fleet."""

    words: Words
    longest: int
    """Its context: tokens of prompt and reply together."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Entries of one file."""

    model: str
    """The model that gets all of them; empty: each says its own."""
    entries: Sequence[Entry]


@dataclass(frozen=True, kw_only=True)
class Replay:
    loads: Mapping[str, ClosedLoop]
    """Model -> its requests; models without any are not there. Who asks once is a user with one turn."""
    counts: Mapping[str, Mapping[str, int]]
    """Model -> requests: in_traces, played, and those of LEFT_OUT."""


def read_parts(traces: Sequence[str], models: Sequence[str], form: str = "") -> list[Part]:
    """`traces`: "MODEL=FILE", or "FILE" whose lines have a `model`, or where there is only one model.

    Raises ConfigError.
    """
    if not traces:
        raise ConfigError(f"no trace: write --trace {models[0]}=FILE, for each model that shall be asked")
    parts = []
    for text in traces:
        model, equals, file = text.partition("=")
        if not equals or (model not in models and Path(text).exists()):
            model, file = models[0] if len(models) == 1 else "", text
        elif model not in models:
            raise ConfigError(f"--trace {text}: the fleet has no model {model!r}, but {', '.join(models)}")
        parts.append(Part(model=model, entries=read_trace(Path(file), form)))
    for entry in (entry for part in parts if not part.model for entry in part.entries):
        if entry.model is None:
            raise ConfigError(f'{entry.where}: no model is named; write --trace MODEL=FILE, or add its "model"')
        if entry.model not in models:
            known = ", ".join(models)
            raise ConfigError(
                f"{entry.where}: the fleet has no model {entry.model!r}, but {known}; or write MODEL=FILE"
            )
    return parts


def make_replay(parts: Sequence[Part], served: Mapping[str, Served], pace: Pace) -> Replay:
    """What is played of the traces. Raises ConfigError for a line that cannot be meant, and when nothing is left."""
    users: dict[str, list[list[Turn]]] = {}
    counts = {name: dict.fromkeys(("in_traces", "played", *LEFT_OUT), 0) for name in served}
    played, sizes = 0, [block_tokens_of(part.entries, pace.block_tokens) for part in parts]
    for begins_s, number, entry in _in_time(parts, pace):
        model = parts[number].model or str(entry.model)
        of, turns, asks = counts[model], list[Turn](), _asks(entry)
        of["in_traces"] += max(1, len(asks))
        of["without_reply"] += not asks
        for asked, reply in asks:
            if begins_s > 60 * pace.minutes or played == pace.requests:
                of["beyond_limit"] += 1
                continue
            words = served[model].words
            prompt = _prompt(asked, words, sizes[number], (number, entry.line))
            output_tokens = words.count(reply) if isinstance(reply, str) else reply or pace.output_tokens
            if prompt is None:
                of["refused_by_chat_format"] += 1
            elif len(prompt) + output_tokens > served[model].longest:
                of["longer_than_context"] += 1
            else:
                pause_s = pace.think_s / pace.speed if turns else begins_s
                key = f"{number}.{entry.line}.{len(turns)}"
                turns.append(greedy(model, key, prompt, max(1, output_tokens), think_s=pause_s))
                of["played"] += 1
                played += 1
        if turns:
            users.setdefault(model, []).append(turns)
    if not played:
        raise ConfigError(f"nothing of the traces can be played: {counts}")
    return Replay(loads={model: ClosedLoop(users=of) for model, of in users.items()}, counts=counts)


def _in_time(parts: Sequence[Part], pace: Pace) -> list[tuple[float, int, Entry]]:
    """(seconds from the run's start, number of the part, entry), in this order. Files with times have one clock."""
    times = [entry.at for part in parts for entry in part.entries if entry.at is not None]
    first, found = min(times, default=0.0), list[tuple[float, int, Entry]]()
    for number, part in enumerate(parts):
        timed = part.entries[0].at is not None
        gaps_s = np.random.default_rng((pace.seed, number)).exponential(1 / pace.rate, len(part.entries))
        for entry, drawn_s in zip(part.entries, np.cumsum(gaps_s).tolist(), strict=True):
            if (entry.at is not None) != timed:
                has = (
                    "has no timestamp, and the first one has" if timed else "has a timestamp, and the first one has not"
                )
                raise ConfigError(f"{entry.where}: it {has}: write it in all lines of the file, or in none")
            at_s = drawn_s if entry.at is None else (entry.at - first) * pace.unit_s
            found.append((at_s / pace.speed, number, entry))
    return sorted(found, key=lambda one: one[:2])


def _asks(entry: Entry) -> list[tuple[Blocks | Conversation, str | int | None]]:
    """What is asked, one request after the other, and the reply: its text, or its tokens if they are known."""
    asked = entry.asked
    if isinstance(asked, Blocks):
        return [(asked, entry.output_tokens)]
    if isinstance(asked, str):
        return [((Message("user", asked),), entry.output_tokens)]
    replies = [at for at in range(1, len(asked)) if asked[at].role == "assistant" != asked[at - 1].role]
    return [(asked[:at], asked[at].content) for at in replies]


def _prompt(asked: Blocks | Conversation, words: Words, block_tokens: int, source: tuple[int, int]) -> list[int] | None:
    """Token ids; None where the chat format refuses the messages. `source`: the number of the file, and the line."""
    if not isinstance(asked, Blocks):
        return words.chat(asked)
    (file, line), tokens = source, asked.input_tokens
    if asked.hash_ids is None:
        return words.blocks([line], tokens, tokens=tokens, salt=UNIQUE + file)
    return words.blocks(asked.hash_ids, block_tokens, tokens=tokens, salt=file)


def block_tokens_of(entries: Sequence[Entry], given: int) -> int:
    """Tokens of the block that a hash id stands for: the power of two by which each line's length and number of ids fit
    each other, 512 (Mooncake's) where several do. `given`: what the user says, 0 for nothing.

    Raises ConfigError with the line that does not fit.
    """
    least, most = 1, MOST_BLOCK_TOKENS
    for entry in entries:
        asked = entry.asked
        if not isinstance(asked, Blocks) or asked.hash_ids is None:
            continue
        count, length = len(asked.hash_ids), asked.input_tokens
        if given and count * given < length:
            raise ConfigError(f"{entry.where}: {count} hash_ids of {given} tokens are less than input_length {length}")
        if not given:
            before = least, most
            least = max(least, -(-length // max(1, count)))
            most = min(most, (length - 1) // (count - 1)) if count > 1 else most
            if not count or least > most:
                fit = f"; lines before it have blocks of {before[0]} to {before[1]} tokens"
                raise ConfigError(
                    f"{entry.where}: {count} hash_ids do not fit input_length {length}{fit}: mend it, or say --block-tokens"
                )
    sizes = [size for size in (1 << power for power in range(MOST_BLOCK_TOKENS.bit_length())) if least <= size <= most]
    if given or MOONCAKE_BLOCK_TOKENS in sizes:
        return given or MOONCAKE_BLOCK_TOKENS
    if len(sizes) != 1:
        raise ConfigError(f"{entries[0].where}: a hash id stands for {least} to {most} tokens: say --block-tokens N")
    return sizes[0]
