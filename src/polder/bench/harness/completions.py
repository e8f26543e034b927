"""The parts of the OpenAI completions protocol that a load driver reads and writes, as typed structs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["DONE", "Choice", "Chunk", "Usage", "decode_chunk", "encode_body", "token_ids"]

DONE = b"[DONE]"
"""The data of the last event of a stream."""

_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


class PromptDetails(msgspec.Struct):
    """Sent by vLLM under --enable-prompt-tokens-details."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Comes with the last chunk but one."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Choice(msgspec.Struct):
    """New output of one sequence."""

    text: str = ""
    token_ids: list[int] | None = None
    """Only when the body asked for `return_token_ids`."""


class Chunk(msgspec.Struct):
    """One event of a stream. Fields that are not named here are skipped unparsed."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()
    """A failure in mid-stream: the status line was 200 by then."""


decode_chunk = msgspec.json.Decoder(Chunk).decode


def encode_body(
    *, model: str, prompt: Sequence[int], output_tokens: int, extra: Mapping[str, object] | None = None
) -> bytes:
    """JSON of a greedy, streamed completion of exactly `output_tokens` tokens."""
    body: dict[str, object] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,  # so that the text holds a word for every token
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body | dict(extra or {}))


def token_ids(choice: Choice) -> list[int]:
    """Ids of a chunk's tokens: as sent, else read from the text, which the bench's tokenizer (`t<i>` is id i) makes
    exact."""
    if choice.token_ids is not None:
        return choice.token_ids
    return [_SPECIAL[word] if word in _SPECIAL else int(word[1:]) for word in choice.text.split()]
