"""Which broker a command talks to: --socket, else $POLDER_BROKER, else this user's fleet that started last (serve/runtime.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from polder.errors import BrokerUnavailable
from polder.serve.runtime import discover_socket, user_dir

__all__ = ["AsJson", "Socket", "find_socket"]

Socket = Annotated[
    Path | None,
    typer.Option(help="The broker's socket (default: $POLDER_BROKER, else that of your fleet which started last)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def find_socket(given: Path | None) -> Path:
    """Raises BrokerUnavailable when there is none to be found."""
    if given is not None:
        return given
    if os.environ.get("POLDER_BROKER"):
        return Path(os.environ["POLDER_BROKER"])
    found = discover_socket()
    if found is None:
        raise BrokerUnavailable(
            f"no fleet of yours runs here (looked in {user_dir()}): start `polder serve`, or name a broker with --socket"
        )
    return found
