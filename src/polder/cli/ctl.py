"""`polder ctl`: asks the broker for its reasons, overrides its decisions, and changes a running fleet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from polder.broker.wire import EngineStatus, Resize, Sleep, Stream, Wake
from polder.cli.options import AsJson, Socket, find_socket
from polder.errors import ConfigError
from polder.units import format_bytes, parse_bytes

__all__ = ["app"]

app = typer.Typer(
    help="Ask the broker for its reasons, override its decisions, change a running fleet.",
    no_args_is_help=True,
    add_completion=False,
)
Model = Annotated[str, typer.Argument(help="The model's name in the fleet file.")]
_EXPLAINED = (
    *("engine", "state", "held_units", "target_units", "reason", "busy_units", "waiting_units", "cached_units"),
    *("floor_units", "share_units", "ceiling_units", "borrowed_units", "lent_units", "pinned_units", "unit_tokens"),
    *("layers", "segments", "asleep", "weights_reason"),
    "curve",
)


@app.command()
def status(socket: Socket = None, as_json: AsJson = False) -> None:
    """Show once who holds the memory, as `polder top --once` does."""
    from polder.cli.top import top

    top(socket, once=True, as_json=as_json)


@app.command()
def resize(
    engine: Annotated[str, typer.Argument(help="The engine's name.")],
    size: Annotated[str, typer.Argument(help="What to pin it to: 64MiB, or units; 0 hands it back to the policy.")],
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Pin an engine's KV cache to a size."""
    from polder.broker import client
    from polder.serve.metrics import unit_bytes

    path = find_socket(socket)
    units, in_bytes = (int(size), "") if size.isdecimal() else (0, "")
    if not size.isdecimal():
        status = client.status(path)
        unit = next((unit_bytes(found, status) for found in status.engines if found.engine == engine), 0)
        units = parse_bytes(size, what="size") // max(1, unit)
        in_bytes = f", {format_bytes(units * unit)}"
        if unit and not units:
            raise ConfigError(f"size {size}: one unit of {engine} is {format_bytes(unit)}; write that or more")
    client.request(path, Resize(engine=engine, units=units))
    done = f"pinned to {units} units{in_bytes}" if units else "handed back to the policy"
    print(json.dumps({"engine": engine, "pinned_units": units}) if as_json else f"{engine}: {done}")


@app.command()
def sleep(
    engine: Annotated[str, typer.Argument(help="The engine's name.")], socket: Socket = None, as_json: AsJson = False
) -> None:
    """Free an idle engine's memory until its next request or `wake`. Its weights and KV leave the device; what is in
    its tiers stays there."""
    from polder.broker import client

    client.request(find_socket(socket), Sleep(engine=engine))
    print(json.dumps({"engine": engine}) if as_json else f"{engine}: sleeps as soon as it has no requests")


@app.command()
def wake(
    engine: Annotated[str, typer.Argument(help="The engine's name.")], socket: Socket = None, as_json: AsJson = False
) -> None:
    """Give an engine its weights back before its next request."""
    from polder.broker import client

    client.request(find_socket(socket), Wake(engine=engine))
    print(json.dumps({"engine": engine}) if as_json else f"{engine}: gets its weights back")


@app.command()
def stream(
    engine: Annotated[str, typer.Argument(help="The engine's name.")],
    layers: Annotated[int, typer.Argument(help="Layers whose weights it may hold.", min=1)],
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Hold the weights of some layers, stream the others. They are copied in every step, until `wake` or `sleep`."""
    from polder.broker import client

    client.request(find_socket(socket), Stream(engine=engine, segments=layers))
    print(json.dumps({"engine": engine, "layers": layers}) if as_json else f"{engine}: may hold {layers} layers")


@app.command()
def add(model: Model, socket: Socket = None, as_json: AsJson = False) -> None:
    """Start a model that was added to the fleet file. The others serve on."""
    _order("add", model, socket, as_json)


@app.command()
def remove(model: Model, socket: Socket = None, as_json: AsJson = False) -> None:
    """End a model. The others serve on."""
    _order("remove", model, socket, as_json)


@app.command()
def restart(model: Model, socket: Socket = None, as_json: AsJson = False) -> None:
    """End a model and start it with what the fleet file says now. The others serve on."""
    _order("restart", model, socket, as_json)


def _order(verb: Literal["add", "remove", "restart"], model: str, socket: Path | None, as_json: bool) -> None:
    from polder.serve.control import Order, give

    done = give(find_socket(socket), Order(verb=verb, model=model))
    print(json.dumps({"model": model, "done": verb}) if as_json else done)


@app.command()
def explain(socket: Socket = None, as_json: AsJson = False) -> None:
    """Say why each engine has its target."""
    from polder.broker import client

    status = client.status(find_socket(socket))
    engines = status.engines
    if as_json:
        print(json.dumps([{key: getattr(engine, key) for key in _EXPLAINED} for engine in engines]))
        return
    print("\n".join(_in_words(engine) for engine in engines) or "no engine is connected")
    for decision in status.decisions:
        age_s = status.uptime_s - decision.uptime_s
        print(f"{age_s:.1f} s ago: {decision.engine}: {decision.action} {decision.segments} layers: {decision.reason}")


def _in_words(e: EngineStatus) -> str:
    loan = f", {e.borrowed_units} of them on loan" if e.borrowed_units else ""
    lent = f", {e.lent_units} of its share are lent" if e.lent_units else ""
    lines = [
        f"{e.engine} ({e.state}): target {e.target_units} units of {e.unit_tokens} tokens: {e.reason}",
        f"    holds {e.held_units}{loan}{lent}; floor {e.floor_units}, share {e.share_units}, ceiling {e.ceiling_units}",
        f"    running requests need {e.busy_units}, waiting ones {e.waiting_units} more; {e.cached_units} hold reusable KV",
    ]
    if e.curve and e.curve[-1] > 0:
        now, most = e.curve[min(e.held_units, len(e.curve) - 1)], e.curve[-1]
        lines.append(
            f"    its prefix cache saves {now:.3g} s of prefill a second, {most:.3g} if it held {len(e.curve) - 1} units"
        )
    if e.layers:
        state = "asleep" if e.asleep else f"weights of {e.segments} of {e.layers} layers on the device"
        lines.append(f"    {state}: {e.weights_reason}")
    return "\n".join(lines)
