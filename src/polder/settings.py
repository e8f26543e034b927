"""Settings: each is declared once, as a field of a frozen dataclass, and read from wherever a user may write it.

    @dataclass(frozen=True, kw_only=True)
    class EngineSettings:
        tbt_goal_s: float | None = setting(GOAL, default=None, help="The time that a token may take")

The declaration holds everything that is said about the setting: how its value is written and read, its default, its
help. Readers, command line options, the example of a fleet file and docs/settings.md are made from
`declared(EngineSettings)`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from polder.errors import ConfigError
from polder.units import format_bytes, parse_bytes, parse_goal, parse_seconds, seconds_text

__all__ = [
    "COUNT",
    "FLAGS",
    "GOAL",
    "PART",
    "PATH",
    "SECONDS",
    "SIZE",
    "TEXT",
    "VARIABLES",
    "Kind",
    "Setting",
    "check_known",
    "choice",
    "declared",
    "default_of",
    "read",
    "setting",
    "words",
]

T = TypeVar("T")
_METADATA = "polder.setting"


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How values of a setting are written."""

    parse: Callable[[Any, str], T]
    """(what a user wrote, its name for the error) -> value. Raises ConfigError with what to write instead."""
    write: Callable[[T], str] = str
    """A text that `parse` reads as the same value."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    key: str
    """As it is written."""
    model: str
    """As it is written in a [[model]] of a fleet file; empty: not there."""
    field: str
    """The attribute of the dataclass."""
    kind: Kind[Any]
    help: str
    required: bool
    default: Any
    default_text: str
    """The default in words; empty: it is clear from the help."""
    example: str
    """A value in TOML."""
    alternative: bool
    """In the example of a fleet file it is commented out, because it excludes another key."""

    @property
    def variable(self) -> str:
        return f"POLDER_{self.key.upper()}"

    @property
    def option(self) -> str:
        return f"--{self.key.replace('_', '-')}"


def setting(
    kind: Kind[Any],
    *,
    help: str,
    default: Any = dataclasses.MISSING,
    default_text: str = "",
    example: str = "",
    key: str = "",
    model: str = "",
    alternative: bool = False,
) -> Any:
    """A dataclass field that is a setting. `key`: the field's own name without its unit if it is empty."""
    given = {"kind": kind, "help": help, "default_text": default_text, "example": example, "key": key, "model": model}
    return dataclasses.field(default=default, metadata={_METADATA: given | {"alternative": alternative}})


def declared(*classes: type) -> list[Setting]:
    """The settings among the fields of some dataclasses, in their order."""
    found = []
    for field in (field for of in classes for field in dataclasses.fields(of)):
        given = field.metadata.get(_METADATA)
        if given is not None:
            required = field.default is dataclasses.MISSING
            default = None if required else field.default
            values = {**given, "key": given["key"] or field.name.removesuffix("_bytes").removesuffix("_s")}
            found.append(Setting(field=field.name, required=required, default=default, **values))
    return found


def read(settings: Mapping[str, Setting], given: Mapping[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    """The values of what is given, by field. `settings`: by the keys of `given`; `name(key)`: the setting in an error.

    Raises ConfigError on a bad value and on a missing key. Unknown keys are for `check_known`.
    """
    for key, declaration in settings.items():
        if declaration.required and key not in given:
            raise ConfigError(f"{name(key)} is missing; add a line {key} = {declaration.example or '...'}")
    return {settings[key].field: settings[key].kind.parse(given[key], name(key)) for key in settings if key in given}


def check_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises ConfigError for the first key that is not known, with the one that was probably meant."""
    names = list(known)
    for key in given:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            raise ConfigError(f"{what}: unknown key {key!r}; {hint}")


# ---------------------------------------------------------------- kinds of values


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} {value!r}: write a text")
    return value


def _path(value: Any, name: str) -> Path:
    return Path(_text(value, name))


def _count(value: Any, name: str) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError(f"{name} {value!r}: write a number, 1 or more")
    return number


def _part(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} {value!r}: write a part of the device, for example 0.04") from None


def _flags(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ConfigError(f'{name} {value!r}: write a list of texts, for example ["--enforce-eager"]')
    return tuple(value)


def _variables(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value.values()):
        raise ConfigError(f'{name} {value!r}: write a table of texts, for example {{ KEY = "value" }}')
    return dict(value)


def _goal(value: Any, name: str) -> float:
    """A bare number is seconds. Nobody means 200 s for a token, but milliseconds: large ones need their unit."""
    if isinstance(value, int | float) and value >= 5:
        raise ConfigError(f'{name} = {value}: write the unit too, e.g. "{value:g}ms"')
    return parse_goal(value, what=name)


def choice(*options: str) -> Kind[str]:
    """One of some words."""

    def parse(value: Any, name: str) -> str:
        if value not in options:
            raise ConfigError(f"{name} {value!r}: write {' or '.join(map(repr, options))}")
        return str(value)

    return Kind(parse)


def words(*known: str) -> Kind[tuple[str, ...]]:
    """Some of these words, as a list or with commas between them; the value has them in the order of `known`."""

    def parse(value: Any, name: str) -> tuple[str, ...]:
        given = value.split(",") if isinstance(value, str) else value
        if not isinstance(given, list | tuple):
            raise ConfigError(f"{name} {value!r}: write a list of {', '.join(known)}")
        named = [str(word).strip() for word in given if str(word).strip()]
        for word in named:
            if word not in known:
                raise ConfigError(f"{name}: unknown {word!r}; known are {', '.join(known)}")
        return tuple(word for word in known if word in named)

    return Kind(parse, ",".join)


TEXT: Kind[str] = Kind(_text)
PATH: Kind[Path] = Kind(_path)
COUNT: Kind[int] = Kind(_count)
PART: Kind[float] = Kind(_part, repr)
FLAGS: Kind[tuple[str, ...]] = Kind(_flags, " ".join)
VARIABLES: Kind[dict[str, str]] = Kind(_variables)
SIZE: Kind[int] = Kind(lambda value, name: parse_bytes(value, what=name))
SECONDS: Kind[float] = Kind(lambda value, name: parse_seconds(value, what=name), seconds_text)
GOAL: Kind[float] = Kind(_goal, seconds_text)


def default_of(declaration: Setting) -> str:
    """The default as users write it: "2 MiB", "200ms"; empty when there is none to be named."""
    if declaration.default_text or declaration.required or declaration.default in (None, "", 0, ()):
        return declaration.default_text
    if declaration.kind is SIZE:
        return format_bytes(declaration.default).replace(" ", "")
    if declaration.kind is SECONDS:
        seconds = declaration.default
        return f"{seconds:g}s" if seconds >= 1 else f"{1000 * seconds:g}ms"
    return str(declaration.kind.write(declaration.default))
