"""`polder`: serve, broker, init, top, ctl, plan, bench, sim, doctor, fsck, version.

Exit codes: 2 the request is impossible as it stands, 3 the machine or another process is not as needed, 70 a bug in
Polder.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from polder.cli import bench, ctl, doctor, fsck, init, plan, serve, sim, top
from polder.errors import EnvironmentFault, PolderError, UsageError

__all__ = ["app", "main"]

_EXTRAS = {"serve": "serve,gpu", "bench": "bench,gpu", "sim": "bench", "plan": "gpu"}
"""What a verb needs beside the dependencies: extras of the distribution. Without a GPU it is cpu in place of gpu."""

# Commands import what they need when they run: `polder version` must not wait for rich, nor the broker for httpx.
app = typer.Typer(
    name="polder",
    help="Share KV-cache memory between vLLM engines on one device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would swallow the [tables] of the fleet file in the help
)


@app.callback()
def polder(
    show: Annotated[
        bool,
        typer.Option("--version", callback=doctor.show_version, is_eager=True, help="Print the versions and exit."),
    ] = False,
) -> None:
    """Share KV-cache memory between vLLM engines on one device."""


app.command("serve")(serve.serve_fleet)
app.command("broker")(serve.run_broker)
app.command("init")(init.init)
app.command("top")(top.top)
app.add_typer(ctl.app, name="ctl")
app.command("plan")(plan.plan)
app.add_typer(bench.app, name="bench")
app.add_typer(sim.app, name="sim")
app.command("doctor")(doctor.doctor)
app.command("fsck")(fsck.fsck)
app.command("version")(doctor.version)


def main() -> None:
    """Entry point. Polder's errors become a message on stderr and an exit code."""
    _hold_streams()
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except EnvironmentFault as error:
        _fail(error, 3)
    except PolderError as error:
        _fail(error, 70)
    except ModuleNotFoundError as error:
        verb = next(iter(sys.argv[1:]), "")
        if verb not in _EXTRAS or str(error.name).startswith("polder"):
            raise
        install = f"pip install 'polder-kv[{_EXTRAS[verb]}]'"
        _fail(EnvironmentFault(f"`polder {verb}` needs {error.name}: {install}"), 3)


def _hold_streams() -> None:
    """Standard streams that were closed become /dev/null. Else a socket would get such a number, and a child would
    write its log there."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _fail(error: PolderError, code: int) -> None:
    print(f"polder: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
