"""What every stage has in common: its arguments, a timed line for each result, and the JSON that it leaves behind.

A stage that is killed at its limit leaves what it had found until then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""
for place in (ROOT, ROOT / "src"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))


class Skipped(Exception):
    """This machine cannot run the stage; the text says what is missing."""


class Stage:
    """One stage's results. `note` prints and keeps a figure, `check` keeps whether something holds."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.device: str = arguments.device
        """"cuda", "fake" or "cpu"."""
        self.tiny: bool = arguments.tiny
        self.models: Path = arguments.models
        self._file: Path = arguments.out / f"{name}.json"
        self._started = time.monotonic()
        self.results: dict[str, Any] = {"stage": name, "device": self.device, "tiny": self.tiny, "status": "stopped"}
        self._figures: dict[str, Any] = self.results.setdefault("figures", {})
        self._failed: list[str] = self.results.setdefault("failed", [])
        self._write()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def note(self, name: str, value: Any, unit: str = "") -> None:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        self.say(f"{name}: {shown} {unit}".rstrip())
        self._figures[f"{name}, {unit}" if unit else name] = value
        self._write()

    def check(self, name: str, *, holds: bool, detail: object = "") -> None:
        """A failed check does not end the stage: what comes after it may tell why."""
        self._figures[name] = holds
        if not holds:
            self._failed.append(f"{name}: {detail}" if detail != "" else name)
        self.say(f"{'right' if holds else 'WRONG'}: {name}{f' ({detail})' if detail != '' else ''}")
        self._write()

    def finish(self, status: str, reason: str = "") -> int:
        self.results |= {"status": status, "reason": reason, "seconds": round(time.monotonic() - self._started, 2)}
        self._write()
        self.say(f"{status}{f': {reason}' if reason else ''}")
        return 0 if status in ("right", "skipped") else 1

    @property
    def failed(self) -> bool:
        return bool(self._failed)

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps(self.results, indent=1) + "\n")
        draft.replace(self._file)


def main(name: str, stage: Callable[[Stage], None]) -> int:
    """Runs a stage as a command of its own."""
    parser = argparse.ArgumentParser(prog=name, description=sys.modules["__main__"].__doc__)
    parser.add_argument("--device", choices=("cuda", "fake", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder of the results")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "out" / "test-models", help="folder of the models made here"
    )
    found = Stage(name, parser.parse_args())
    try:
        stage(found)
    except Skipped as reason:
        return found.finish("skipped", str(reason))
    except Exception as error:
        traceback.print_exc()
        return found.finish("failed", f"{type(error).__name__}: {error}")
    return found.finish("wrong" if found.failed else "right")
