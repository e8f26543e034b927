"""What the two models are asked: readers who come back to long texts, and bursts of short questions.

Six readers have a text of six passages each and ask one question after the other. Their conversations stay worth
keeping: without them in the KV cache, the whole text is computed again for each question. Visitors come in bursts with
one passage and one question, and nothing of theirs is asked for again.

Earlier answers in a conversation are the ones in texts.py, not the model's own, so that all arms get the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from polder.bench.harness.driver import ClosedLoop, OpenLoop, RequestRecord, Turn, Workload, greedy
from polder.demo.texts import PASSAGES, Passage

__all__ = ["BURSTS_S", "CHAT", "DOCS", "Chat"]

DOCS, CHAT = "docs", "chat"
"""The two models' names."""
READERS, READERS_PASSAGES, TURNS = 6, 6, 5
THINK_S = 0.5
"""Between an answer and the reader's next question."""
BURSTS_S, VISITORS = (8.0, 22.0, 36.0), 6
ANSWER_TOKENS = 24
END = "<|im_end|>"
"""Ends an answer; a request goes on to its full length, so that all arms compute the same number of tokens."""


class Chat:
    """Questions as token ids, in the model's own chat format, and answers as text."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: one of transformers, with a chat template."""
        self._tokenizer = tokenizer

    def workloads(self) -> dict[str, Workload]:
        """What is measured, by model."""
        readers = [[self._reader(reader, turn) for turn in range(TURNS)] for reader in range(READERS)]
        return {DOCS: ClosedLoop(users=readers, stagger_s=0.3), CHAT: OpenLoop(turns=list(self._visitors()))}

    def greeting(self) -> dict[str, Workload]:
        """A question to each model, before anything is measured."""
        passage = PASSAGES[0]
        messages = [_user(passage, passage.questions[1][0])]
        return {
            name: ClosedLoop(users=[[greedy(name, "greeting", self._ids(messages), ANSWER_TOKENS)]])
            for name in (DOCS, CHAT)
        }

    def answer(self, record: RequestRecord) -> str:
        text: str = self._tokenizer.decode(record.output_ids)
        return text.partition(END)[0].strip()

    def _reader(self, reader: int, turn: int) -> Turn:
        passages = [PASSAGES[(reader + at) % len(PASSAGES)] for at in range(READERS_PASSAGES)]
        pairs = [passages[at].questions[0] for at in range(turn + 1)]
        text = "\n\n".join(_line(passage.text) for passage in passages)
        messages = [{"role": "user", "content": f"{text}\n\nAnswer in one sentence. {pairs[0][0]}"}]
        for (_, answer), (question, _) in pairwise(pairs):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return greedy(
            DOCS,
            f"reader {reader + 1}: {pairs[-1][0]}",
            self._ids(messages),
            ANSWER_TOKENS,
            think_s=THINK_S,
            cold_start=turn == 0,
        )

    def _visitors(self) -> Iterator[Turn]:
        for burst, at_s in enumerate(BURSTS_S):
            for visitor in range(VISITORS):
                number = burst * VISITORS + visitor
                passage = PASSAGES[number % len(PASSAGES)]
                question = passage.questions[number // len(PASSAGES) % 2][0]
                messages = [_user(passage, question, f"Visitor {number + 1}. ")]
                key = f"visitor {number + 1}: {question}"
                yield greedy(CHAT, key, self._ids(messages), ANSWER_TOKENS, at_s=at_s + 0.1 * visitor)

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _user(passage: Passage, question: str, begins: str = "") -> dict[str, str]:
    content = f"{begins}{_line(passage.text)}\n\nAnswer in one sentence. {question}"
    return {"role": "user", "content": content}


def _line(text: str) -> str:
    return text.replace("\n", " ")
