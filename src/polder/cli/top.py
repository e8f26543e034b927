"""`polder top`: which engine holds how much memory, who borrows, and why."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from polder.broker import client
from polder.cli.options import AsJson, Socket, find_socket
from polder.errors import BrokerUnavailable
from polder.serve.control import children_of
from polder.serve.supervisor import FleetStatus

__all__ = ["top"]


def top(
    socket: Socket = None,
    url: Annotated[
        str | None, typer.Option(help="A fleet's endpoint instead of a socket, e.g. http://host:8000.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
    as_json: AsJson = False,
    interval: Annotated[float, typer.Option(help="Seconds between updates.", min=0.1)] = 1.0,
) -> None:
    """Live view of memory by owner, engines, loans and give-back times. With --json, a line for each update."""
    path = None if url is not None else find_socket(socket)
    first = _look(path, url)
    if as_json:
        print(msgspec.json.encode(first).decode(), flush=True)
        while not once:
            time.sleep(interval)
            print(msgspec.json.encode(_look(path, url)).decode(), flush=True)
        return
    from rich.console import Console

    from polder.cli.view import render, watch

    if once:
        console = Console()
        console.print(render(first, width=console.width))
    else:
        watch(first, lambda: _look(path, url), interval)


def _look(path: Path | None, url: str | None) -> FleetStatus:
    """Raises BrokerUnavailable, or EnvironmentFault when no fleet answers at the URL."""
    if url is None:
        assert path is not None
        return FleetStatus(broker=client.status(path), children=children_of(path))
    address = url.rstrip("/").removesuffix("/v1") + "/polder/status"
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return msgspec.json.decode(answer.read(), type=FleetStatus)
    except (urllib.error.URLError, OSError, ValueError, msgspec.MsgspecError) as error:
        raise BrokerUnavailable(f"no fleet answers at {address}: {error}") from error
