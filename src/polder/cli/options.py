"""Options that commands share, and options that are made from declared settings."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from polder.errors import BrokerUnavailable, ConfigError
from polder.serve.runtime import discover_sockets, user_dir
from polder.settings import Setting, default_of, read

__all__ = ["AsJson", "Socket", "check_output", "find_socket", "with_options"]

Socket = Annotated[
    Path | None,
    typer.Option(help="The broker's socket (default: $POLDER_BROKER, else that of your fleet which started last)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def find_socket(given: Path | None) -> Path:
    """`given`, else $POLDER_BROKER, else the fleet of this user that started last; says so if there are several.
    Raises BrokerUnavailable without any."""
    if given is not None:
        return given
    if os.environ.get("POLDER_BROKER"):
        return Path(os.environ["POLDER_BROKER"])
    found = discover_sockets()
    if not found:
        raise BrokerUnavailable(
            f"no fleet of yours runs here (looked in {user_dir()}): start `polder serve`, or name a broker with --socket"
        )
    if len(found) > 1:
        others = ", ".join(f"--socket {path}" for path in found[1:])
        typer.echo(
            f"polder: of your {len(found)} fleets this is {found[0]}, which started last; else {others}", err=True
        )
    return found[0]


def check_output(*paths: Path | None) -> None:
    """Makes the folders of files that will be written. Raises ConfigError before any work when one cannot be."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"{path} is a directory: write the name of a file in it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {path.parent}: {error.strerror}; write another file") from error
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"cannot write {path}: permission denied; write another file")


def with_options(settings: Iterable[Setting]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each setting. The command's parameter `given` gets what was given, parsed, by
    field."""
    by_key = {declaration.key: declaration for declaration in settings}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            written = {key: text for key in by_key if (text := arguments.pop(key)) is not None}
            command(given=read(by_key, written, lambda key: by_key[key].option), **arguments)

        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "given"
        ]
        options = [_parameter(key, declaration) for key, declaration in by_key.items()]
        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _parameter(key: str, declaration: Setting) -> inspect.Parameter:
    default = default_of(declaration)
    text = f"{declaration.help}{f' (default: {default})' if default else ''}."
    annotation = Annotated[str | None, typer.Option(declaration.option, help=text)]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
