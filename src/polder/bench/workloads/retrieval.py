"""Long texts that Python itself ships, with what a model is asked about them.

| kind | prompt | continuation |
|---|---|---|
| quote | prose, then "the following passage is repeated" | a passage of the middle of the prose |
| facts | prose with numbered notes strewn in, then "here is the list of all" | all notes, in another order |
| chat | prose and a question, in the model's own chat format | none: the dense model's own answer |
| code | a module | the rest of the module |

Ordinary prose hardly needs its prefix, and any method looks good there: `quote` and `facts` need it.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
from collections.abc import Callable
from pathlib import Path

__all__ = ["KINDS", "text_of"]

KINDS = ("quote", "facts", "chat", "code")
Tokens = list[int]
Tokenize = Callable[[str], Tokens]
WORDS = (
    "amber birch cedar delta ember fjord grove heron iris jade koala lemur maple north ocean pearl river stone tulip"
)


def prose() -> str:
    """The reference of Python's language."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def text_of(kind: str, tokenize: Tokenize, prompt_tokens: int, more_tokens: int) -> tuple[Tokens, Tokens | None]:
    """(prompt of so many tokens, what follows; None: whatever the dense model answers)."""
    if kind == "code":
        ids = tokenize(Path(argparse.__file__).read_text()[3000:])
        return ids[:prompt_tokens], ids[prompt_tokens : prompt_tokens + more_tokens]
    if kind == "quote":
        end = tokenize("\n\nThe following passage is repeated word for word from the text above:\n\n")
        body = tokenize(prose())[: prompt_tokens - len(end)]
        at = int(0.45 * len(body))
        return body + end, body[at : at + more_tokens]
    if kind == "facts":
        return _facts(tokenize, prompt_tokens, more_tokens)
    head = tokenize("<|im_start|>user\nRead this text.\n\n")
    question = "\n\nExplain in a few sentences what the text says about classes and their attributes.<|im_end|>\n"
    end = tokenize(question + "<|im_start|>assistant\n")
    return head + tokenize(prose())[9000 : 9000 + prompt_tokens - len(head) - len(end)] + end, None


def _facts(tokenize: Tokenize, prompt_tokens: int, more_tokens: int) -> tuple[Tokens, Tokens]:
    draw = random.Random(5)
    codes = {word: draw.randrange(10_000, 99_999) for word in WORDS.split()}
    notes = {word: f"\nNote: the access code of {word} is {code}.\n" for word, code in codes.items()}
    end = tokenize("\n\nHere is the list of all access codes that were mentioned in the text above:\n")
    pieces = [tokenize(note) for note in notes.values()]
    text = tokenize(prose())
    step = (prompt_tokens - len(end) - sum(map(len, pieces))) // len(pieces)
    body: Tokens = []
    for number, piece in enumerate(pieces):
        body += text[number * step : (number + 1) * step] + piece
    body += text[len(pieces) * step :][: prompt_tokens - len(end) - len(body)]
    order = list(codes)
    draw.shuffle(order)
    return body + end, tokenize("".join(notes[word][1:] for word in order))[:more_tokens]
