"""`polder bench`: measure Polder against stock vLLM on this machine. Each file of polder.bench.suites is a command."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from polder.cli.options import check_output

__all__ = ["app", "suite_names"]

SUITES = "polder.bench.suites"
SHARED = ("base", "plan")
"""Modules there that are no suite."""
OPTIONS: Mapping[str, Any] = {
    "json_file": Annotated[
        Path | None, typer.Option("--json", help="Write the result here (default: NAME.json in the workdir).")
    ],
    "html_file": Annotated[Path | None, typer.Option("--html", help="Write the tables and plots as HTML here.")],
    "workdir": Annotated[Path, typer.Option(help="Folder for models (kept), logs and temporary disk pages.")],
}
DEFAULTS = {"json_file": None, "html_file": None, "workdir": Path("out/bench")}


def suite_names() -> list[str]:
    spec = find_spec(SUITES)
    assert spec is not None
    return [module.name for module in iter_modules(spec.submodule_search_locations) if module.name not in SHARED]


class _Suites(TyperGroup):
    """Suites are imported when one of them is named: `polder version` must not wait for them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return suite_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command(cmd_name) if cmd_name in suite_names() else None


app = typer.Typer(
    cls=_Suites,
    help="Measure Polder against stock vLLM on this machine.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def bench() -> None:
    """Every bench writes JSON of the same shape: bench, conditions, arms, ratios, checks."""


def _command(name: str) -> Any:
    """Its options: the files, a flag for each plan but the full one, stages and arms, and what its plan names."""
    from polder.bench.suites.plan import Plan, parse_names

    suite = getattr(import_module(f"{SUITES}.{name}"), f"{name.title()}Suite")
    plans = {key: plan for key, plan in vars(suite).items() if isinstance(plan, Plan)}
    full = plans.pop("full")
    arms = dict.fromkeys(arm for of in full.choices.values() for arm in of.known)

    def run(
        json_file: Path | None, html_file: Path | None, workdir: Path, stages: str, arms_named: str, **given: Any
    ) -> None:
        result = json_file or workdir / f"{name}.json"
        check_output(result, html_file)
        plan = next((plan for key, plan in plans.items() if given[key]), full)
        for option, values in full.options.items():
            if given[option]:
                chosen: Any = {option: _one_of(given[option], values)}
                plan = replace(plan, **chosen)
        written = {key: given[key] for key in full.given}
        plan = replace(plan, **{key: of for key, of in written.items() if of is not None and of != []})
        named = {
            "stages": parse_names(stages, full.choices, what="stage"),
            "arms": parse_names(arms_named, arms, what="arm"),
        }
        suite(plan.only(**named), workdir=workdir).run(result, html_file)
        if json_file is None:
            print(f"the result is in {result}")

    def option(key: str, flag: str, help: str, kind: Any = str) -> tuple[str, Any, Any]:
        return key, Annotated[kind, typer.Option(flag, help=help)], kind()

    parameters = [
        *((key, kind, ... if _is_argument(kind) else None) for key, kind in full.given.items()),
        *((key, kind, DEFAULTS[key]) for key, kind in OPTIONS.items()),
        *(option(key, f"--{key}", plan.help, bool) for key, plan in plans.items()),
        option("stages", "--stages", f"Only these: {','.join(full.choices)}."),
        option(
            "arms_named", "--arms", f"Only these: {','.join(arms)}." if arms else "This bench has no arms to choose."
        ),
        *(option(key, f"--{key}", f"One of {', '.join(values)}.") for key, values in full.options.items()),
    ]
    only = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(key, only, annotation=kind, default=default) for key, kind, default in parameters]
    )
    run.__annotations__ = {key: kind for key, kind, _ in parameters}
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    one.command(name, help=suite.__doc__)(run)
    return typer.main.get_command(one)


def _is_argument(kind: Any) -> bool:
    return any(isinstance(of, typer.models.ArgumentInfo) for of in kind.__metadata__)


def _one_of(value: str, values: tuple[str, ...]) -> str:
    from polder.errors import ConfigError

    if value not in values:
        raise ConfigError(f"{value!r} is none of {', '.join(values)}")
    return value
