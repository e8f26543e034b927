"""A model's tokenizer: texts become token ids, and so do blocks of which no text is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from polder.arrays import splitmix64
from polder.bench.workloads.trace_files import Message
from polder.errors import ConfigError
from polder.serve.arguments import is_given, option

__all__ = ["Words", "load_words"]


class Words:
    """`tokenizer`: one of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A special token may stand for an image, or end a message.
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._plain = np.array(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.uint64)

    def count(self, text: str) -> int:
        """Tokens of a text that follows another."""
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        """The prompt by which an answer to these messages is asked for, in the model's chat format; the plain texts for
        a model without one. None: the format refuses them, for example for the order of their roles."""
        if not self._tokenizer.chat_template:
            return list(self._tokenizer("\n".join(message.content for message in messages)).input_ids)
        said = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError:
            return None
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def blocks(self, ids: Sequence[int], block_tokens: int, *, tokens: int, salt: int) -> list[int]:
        """The first `tokens` tokens of these blocks: equal ids with equal `salt` give equal blocks, on every machine."""
        used = ids[: -(-tokens // block_tokens)]
        block = splitmix64(np.array([number % (1 << 64) for number in used], dtype=np.uint64))
        keys = block[:, None] + np.arange(block_tokens, dtype=np.uint64) + splitmix64(np.array([salt], dtype=np.uint64))
        drawn = splitmix64(keys.ravel()[:tokens]) % np.uint64(len(self._plain))
        chosen: list[int] = self._plain[drawn.astype(np.int64)].tolist()
        return chosen


def load_words(name: str, path: str, args: Sequence[str]) -> Words:
    """The tokenizer of the fleet's model `name`, as its `args` name it. Raises ConfigError."""
    import transformers

    given = option(args, "--tokenizer") or path
    trusted = is_given(args, "--trust-remote-code")
    try:
        return Words(transformers.AutoTokenizer.from_pretrained(given, trust_remote_code=trusted))
    except (OSError, ValueError, ImportError, KeyError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model {name}: no tokenizer in {given!r}: {why}") from error
