"""Two engines on one device: idle KV memory goes to the one that has requests, and comes back when its owner needs it."""

from __future__ import annotations

import sys
import time

from engine import broker_for, compare, prompts, running, sizes_of, stock_answers
from stage import Stage, main


def stage(stage: Stage) -> None:
    sizes = sizes_of(stage)
    total = sizes.small_units * sizes.small_unit_bytes
    asked, tokens = prompts(12, 150, seed=31), 32
    expected = stock_answers(stage, "small", asked, tokens)
    share = {"POLDER_KV_SHARE": f"{total // 2}B"}
    with (
        broker_for(stage, total) as broker,
        running(stage, "small", broker.settings("a", **share)) as a,
        running(stage, "small", broker.settings("b", **share)) as b,
    ):
        for turn in range(2 if stage.tiny else 4):
            busy, idle = (a, b) if turn % 2 == 0 else (b, a)
            name = "ab"[turn % 2]
            compare(stage, f"turn {turn}, {name} alone", "small", busy.ask(asked, tokens), expected)
            stage.note(f"turn {turn}: units of {name} after it", broker.engine(name).held_units)
            stage.note(f"turn {turn}: first token of the other", idle.first_token_s(asked[0]), "s")
        begin = time.perf_counter()
        while time.perf_counter() - begin < (1 if stage.tiny else 5):
            compare(
                stage, "in short turns", "small", a.ask(asked[:3], 4) + b.ask(asked[:3], 4), _cut(expected[:3], 4) * 2
            )
        for name, engine in (("a", a), ("b", b)):
            stage.note(f"{name}: preemptions", engine.figures()["preemptions_total"])


def _cut(answers: list, tokens: int) -> list:  # type: ignore[type-arg]
    from dataclasses import replace

    return [replace(answer, tokens=answer.tokens[:tokens], logprob=0.0) for answer in answers]


if __name__ == "__main__":
    sys.exit(main("sharing", stage))
