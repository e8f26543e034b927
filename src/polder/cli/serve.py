"""`polder serve FLEET.toml` and `polder broker`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from polder.broker.config import BrokerConfig
from polder.broker.policy import PolicyConfig
from polder.errors import ConfigError
from polder.units import format_bytes, parse_bytes, parse_seconds

__all__ = ["run_broker", "serve_fleet"]


def serve_fleet(
    fleet: Annotated[Path, typer.Argument(help="The fleet file; its keys are listed in polder/serve/fleet.py.")],
    check: Annotated[bool, typer.Option("--check", help="Check the file and the budget, start nothing.")] = False,
    socket: Annotated[Path | None, typer.Option(help="The broker's socket (default: a private one).")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep the children's logs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print the fleet as JSON.")] = False,
) -> None:
    """Serve several models behind one OpenAI endpoint, their KV caches under one budget."""
    from polder.serve.fleet import load_fleet
    from polder.serve.run import run

    loaded = load_fleet(fleet)
    if not check:
        run(loaded, socket_path=socket, log_dir=log_dir)
    elif as_json:
        needs = {model.name: model.least_bytes(loaded.page_bytes) for model in loaded.models}
        print(json.dumps({"device": loaded.device, "kv_budget_bytes": loaded.budget_bytes, "least_bytes": needs}))
    else:
        for model in loaded.models:
            need = model.least_bytes(loaded.page_bytes)
            print(f"{model.name}: needs at least {format_bytes(need) if need else 'what vLLM says at its start'}")
        print(f"{loaded.device}: kv_budget {format_bytes(loaded.budget_bytes)}: ok")


def run_broker(
    socket: Annotated[Path, typer.Option(help="Where engines connect; at most 107 bytes of path.")],
    device: Annotated[list[str], typer.Option(help="NAME=SIZE of KV budget, e.g. cpu:0=64GiB; may be repeated.")],
    page: Annotated[str, typer.Option(help="Page size.")] = "2MiB",
    reserve_low: Annotated[float, typer.Option(help="Refill the reserve below this part of the device.")] = 0.02,
    reserve_high: Annotated[float, typer.Option(help="... up to this part.")] = 0.06,
    hold: Annotated[str, typer.Option(help="Cache memory moves no more often.")] = "1s",
    deadline: Annotated[str, typer.Option(help="Time to give recalled memory back.")] = "200ms",
) -> None:
    """Run a broker alone, for engines started by hand with POLDER_BROKER."""
    from polder.broker.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sizes: dict[str, int] = {}
    for text in device:
        name, separator, size = text.partition("=")
        if not separator:
            raise ConfigError(f"--device {text!r}: write NAME=SIZE, e.g. cpu:0=64GiB")
        sizes[name] = parse_bytes(size, what=f"--device {name}")
    policy = PolicyConfig(
        reserve_low_ratio=reserve_low,
        reserve_high_ratio=reserve_high,
        min_hold_s=_seconds(hold, "--hold"),
        deadline_s=_seconds(deadline, "--deadline"),
    )
    page_bytes = parse_bytes(page, what="--page")
    serve(BrokerConfig(socket=socket, devices=sizes, page_bytes=page_bytes, policy=policy))


def _seconds(text: str, what: str) -> float:
    """A bare number is seconds."""
    try:
        return parse_seconds(float(text), what=what)
    except ValueError:
        return parse_seconds(text, what=what)
