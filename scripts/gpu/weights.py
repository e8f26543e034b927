"""Weights that leave the device while nobody asks, and come back with the next request: times and tokens."""

from __future__ import annotations

import sys

from engine import Engine, broker_for, compare, prompts, sizes_of, stock_answers, wait_until
from stage import Stage, main

from polder.broker.client import request  # isort: skip
from polder.broker.wire import Sleep  # isort: skip


def stage(stage: Stage) -> None:
    sizes = sizes_of(stage)
    _one(stage, "small", sizes.small_units * sizes.small_unit_bytes + (512 << 20), 150)
    if stage.device == "cuda" and not stage.tiny:
        _one(stage, "large", 44 << 30, 1024)


def _one(stage: Stage, model: str, device_bytes: int, length: int) -> None:
    asked, tokens = prompts(4, length, seed=41), 24
    expected = stock_answers(stage, model, asked, tokens)
    with broker_for(stage, device_bytes) as broker:
        settings = broker.settings("a", POLDER_WEIGHTS="elastic")
        for options in ({}, {"enforce_eager": True}):
            try:
                engine = Engine(stage, model, settings, **options)
                break
            except Exception as error:
                stage.note(f"{model}: refused with {options or 'the defaults'}", f"{type(error).__name__}: {error}")
        else:
            stage.check(f"{model}: an engine with elastic weights starts", holds=False)
            return
        try:
            engine.ask(asked[:1], 2)
            compare(stage, "awake", model, engine.ask(asked, tokens), expected)
            stage.note(f"{model}: first token, resident", engine.first_token_s(prompts(1, length, seed=42)[0]), "s")
            held = broker.pages_of("a/weights")
            for turn in range(2 if stage.tiny else 4):
                request(broker.socket, Sleep(engine="a"))
                stage.note(
                    f"{model}: asleep after, turn {turn}",
                    wait_until(lambda: broker.engine("a").asleep, "it to sleep"),
                    "s",
                )
                stage.check(f"{model}: its pages are free", holds=broker.pages_of("a/weights") == 0)
                fresh = prompts(1, length, seed=43 + turn)[0]
                stage.note(f"{model}: first token, from sleep, turn {turn}", engine.first_token_s(fresh), "s")
                compare(stage, "after a sleep", model, engine.ask(asked, tokens), expected)
            wait_until(lambda: broker.pages_of("a/weights") == held, "all layers to be back")
            stage.note(f"{model}: pages of weights", held)
        finally:
            engine.close()


if __name__ == "__main__":
    sys.exit(main("weights", stage))
