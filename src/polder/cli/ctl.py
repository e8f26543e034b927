"""`polder ctl`: ask the broker why, or tell it otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polder.broker import client
from polder.broker.wire import Resize
from polder.cli.where import find_socket

__all__ = ["app"]

app = typer.Typer(help="Ask the broker why, or tell it otherwise.", no_args_is_help=True, add_completion=False)
Socket = Annotated[Path | None, typer.Option(help="The broker's socket (default: $POLDER_BROKER, else found).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def resize(
    engine: Annotated[str, typer.Argument(help="The engine's name.")],
    units: Annotated[int, typer.Argument(help="Units to pin it to; 0 hands it back to the policy.", min=0)],
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Pin an engine's KV cache to a size."""
    client.request(find_socket(socket), Resize(engine=engine, units=units))
    done = f"pinned to {units} units" if units else "handed back to the policy"
    print(json.dumps({"engine": engine, "pinned_units": units}) if as_json else f"{engine}: {done}")


@app.command()
def explain(socket: Socket = None, as_json: AsJson = False) -> None:
    """Say why each engine holds what it holds."""
    engines = client.status(find_socket(socket)).engines
    if as_json:
        keys = ("engine", "held_units", "target_units", "busy_units", "waiting_units", "share_units", "reason", "curve")
        print(json.dumps([{key: getattr(engine, key) for key in keys} for engine in engines]))
        return
    for e in engines:
        loan = f", {e.borrowed_units} of them on loan" if e.borrowed_units else ""
        print(
            f"{e.engine}: holds {e.held_units} units of {e.unit_tokens} tokens{loan}; target {e.target_units}: {e.reason}"
        )
        print(f"    requests need {e.busy_units}, {e.waiting_units} more wait; {e.cached_units} hold reusable KV")
        if e.curve and e.curve[-1] > 0:
            at = e.curve[min(e.held_units, len(e.curve) - 1)]
            print(
                f"    its prefix cache saves {at:.3g} s of prefill a second, {e.curve[-1]:.3g} if it held {len(e.curve) - 1}"
            )
