"""`polder init`: writes a fleet file from model folders or from `vllm serve` command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polder.cli.options import check_output
from polder.errors import ConfigError

__all__ = ["init"]


def init(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders of models, names on a hub, or commands in quotes: 'vllm serve /models/llama ...'."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("fleet.toml"),
    device: Annotated[
        str | None,
        typer.Option(help="cuda:0, cpu:0, ... (default: cuda:0 where there is an NVIDIA driver, else cpu:0)."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the OpenAI endpoint.")] = 8000,
) -> None:
    """Write a fleet file for some models, with the largest budget that this machine has room for."""
    from polder.serve.draft import draft, read_command
    from polder.serve.fleet import default_device
    from polder.serve.machine import look

    if out.exists():
        raise ConfigError(f"{out} exists: remove it, or write to another file with --out")
    check_output(out)
    given = [read_command(text) for text in models]
    chosen = device or default_device()
    text = draft(given, look(chosen), chosen, port)
    out.write_text(text)
    print(text, end="")
    print(f"\n{out} is written. `polder serve {out} --check` says whether all is well, `polder serve {out}` serves it.")
