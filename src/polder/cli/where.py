"""Which broker a command talks to: --socket, else $POLDER_BROKER, else this user's fleet that started last."""

from __future__ import annotations

import os
from pathlib import Path

from polder.errors import BrokerUnavailable
from polder.serve.run import discover_socket

__all__ = ["find_socket"]


def find_socket(given: Path | None) -> Path:
    """Raises BrokerUnavailable when there is none to be found."""
    if given is not None:
        return given
    if os.environ.get("POLDER_BROKER"):
        return Path(os.environ["POLDER_BROKER"])
    found = discover_socket()
    if found is None:
        raise BrokerUnavailable("no fleet of this user runs here: start `polder serve`, or name a broker with --socket")
    return found
