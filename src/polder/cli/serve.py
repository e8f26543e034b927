"""`polder serve FLEET.toml` and `polder broker`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polder.cli.where import AsJson
from polder.errors import ConfigError
from polder.serve.schema import EXAMPLE
from polder.units import format_bytes, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from polder.serve.fleet import Fleet
    from polder.serve.supervisor import Event

__all__ = ["run_broker", "serve_fleet"]


def serve_fleet(
    fleet: Annotated[Path, typer.Argument(help="The fleet file (TOML).")],
    check: Annotated[bool, typer.Option("--check", help="Check the file and the budget, start nothing.")] = False,
    socket: Annotated[Path | None, typer.Option(help="The broker's socket (default: a private one).")] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Keep the children's logs here (default: gone at the end).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve several models behind one OpenAI endpoint, their KV caches under one budget."""
    from polder.serve.fleet import load_fleet

    loaded = load_fleet(fleet)
    if check:
        _print_check(loaded, json.dumps if as_json else None)
        return
    from polder.serve.run import run

    run(loaded, _json_event if as_json else _text_event, socket_path=socket, log_dir=log_dir)


# "\b" keeps the lines of a paragraph as they are.
_KEYS = "\n\n".join(f"\b\n{table}" for table in EXAMPLE.split("\n\n"))
serve_fleet.__doc__ = f"{serve_fleet.__doc__}\n\nA fleet file with every key:\n\n{_KEYS}"


def run_broker(
    socket: Annotated[Path, typer.Option(help="Where engines connect; at most 107 bytes of path.")],
    device: Annotated[list[str], typer.Option(help="NAME=SIZE of KV budget, e.g. cpu:0=64GiB; may be repeated.")],
    page: Annotated[str, typer.Option(help="Page size.")] = "2MiB",
    reserve_low: Annotated[float, typer.Option(help="Refill the reserve below this part of the device.")] = 0.04,
    reserve_high: Annotated[float, typer.Option(help="... up to this part.")] = 0.08,
    hold: Annotated[str, typer.Option(help="Cache memory changes hands no more often.")] = "1s",
    deadline: Annotated[str, typer.Option(help="Time to give recalled memory back.")] = "200ms",
) -> None:
    """Run a broker alone, for engines started by hand with POLDER_BROKER. It logs to stderr."""
    import logging

    from polder.broker.config import BrokerConfig
    from polder.broker.policy import PolicyConfig
    from polder.broker.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sizes: dict[str, int] = {}
    for text in device:
        name, separator, size = text.partition("=")
        if not separator or name in sizes:
            raise ConfigError(f"--device {text!r}: write NAME=SIZE, e.g. cpu:0=64GiB, once for each device")
        sizes[name] = parse_bytes(size, what=f"--device {name}")
    policy = PolicyConfig(
        reserve_low_ratio=reserve_low,
        reserve_high_ratio=reserve_high,
        min_hold_s=parse_seconds(hold, what="--hold"),
        deadline_s=parse_seconds(deadline, what="--deadline"),
    )
    serve(BrokerConfig(socket=socket, devices=sizes, page_bytes=parse_bytes(page, what="--page"), policy=policy))


def _print_check(fleet: Fleet, as_json: Callable[[object], str] | None) -> None:
    needs = {model.name: model.floor_bytes or model.least_bytes for model in fleet.models}
    if as_json is not None:
        print(as_json({"device": fleet.device, "kv_budget_bytes": fleet.budget_bytes, "least_bytes": needs}))
        return
    for name, need in needs.items():
        print(f"{name}: {format_bytes(need) + ' of KV memory at least' if need else 'the engine itself will tell'}")
    print(f"{fleet.device}: kv_budget {format_bytes(fleet.budget_bytes)}: enough")


def _text_event(event: Event) -> None:
    print(f"polder: {event.child}: {event.detail}", file=sys.stderr, flush=True)


def _json_event(event: Event) -> None:
    line = {"event": event.kind, "child": event.child, "pid": event.pid, "detail": event.detail}
    print(json.dumps(line), flush=True)
