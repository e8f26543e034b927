"""What a run consists of: stages, the arms of each, and which of them the user has named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from polder.errors import ConfigError

__all__ = ["Plan", "StageArms", "parse_names"]


@dataclass(frozen=True, kw_only=True)
class StageArms:
    """Which arms a stage can run: `StageArms(known=("stock", "polder"), always=("stock",))` for one that compares."""

    known: tuple[str, ...] = ()
    """Empty: the stage starts arms of its own, and runs whichever arms the user has named."""
    always: tuple[str, ...] = ()
    """Run whichever are named, because the others are compared with them."""
    needs_all: tuple[str, ...] = ()
    """The stage compares these with each other, so it cannot run with some of them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of a bench consists of. Subclasses add the sizes of their stages."""

    choices: ClassVar[Mapping[str, StageArms]]
    """Every stage of the bench, in the order in which they run."""
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Fields that are options of the command -> their values."""
    given: ClassVar[Mapping[str, Any]] = {}
    """Fields that the user writes: arguments and options of the command, annotated as typer takes them. What is not
    given keeps the plan's value."""
    name: str
    help: str = ""
    """How it differs from the full plan."""
    stages: tuple[str, ...]
    orders: Mapping[str, tuple[str, ...]]
    """Stage -> the arms of its runs in time."""
    seed: int = 0
    """For prompts that are drawn; traces are fixed."""

    def only(self, *, stages: Sequence[str] = (), arms: Sequence[str] = ()) -> Self:
        """The same with these stages and arms alone; none named: all of the plan's.

        An arm that is named and that a stage's order lacks runs once, after the others. A stage of the plan that none
        of the named arms belongs to is left out. Raises ConfigError when such a stage is named itself, or none is left.
        """
        kept = [stage for stage in self.choices if stage in (stages or self.stages)]
        if not arms:
            return replace(self, stages=tuple(kept))
        lacking = {stage: text for stage in kept if (text := self._lacking(stage, arms))}
        if lacking and (stages or len(lacking) == len(kept)):
            raise ConfigError("; ".join(lacking.values()))
        orders = {stage: self._order(stage, arms) for stage in self.orders}
        return replace(self, stages=tuple(stage for stage in kept if stage not in lacking), orders=orders)

    def describe(self) -> dict[str, Any]:
        """Its fields, for the conditions of a result."""
        return {name: value for name, value in asdict(self).items() if name != "help"}

    def _order(self, stage: str, arms: Sequence[str]) -> tuple[str, ...]:
        of, order = self.choices[stage], self.orders[stage]
        if not of.known:
            return order
        kept = tuple(arm for arm in order if arm in (*arms, *of.always))
        return kept + tuple(arm for arm in of.known if arm in arms and arm not in order)

    def _lacking(self, stage: str, arms: Sequence[str]) -> str:
        """Why these arms give the stage nothing to run; empty when they do."""
        of = self.choices[stage]
        there = set(of.needs_all) <= set(arms) if of.needs_all else (set(of.known) - set(of.always)) & set(arms)
        if there or not of.known:
            return ""
        wanted = ", ".join(of.needs_all or [arm for arm in of.known if arm not in of.always])
        words = "all" if of.needs_all else "some"
        return f"stage {stage} has nothing to run of {', '.join(arms)}: name {words} of {wanted}"


def parse_names(text: str, known: Iterable[str], *, what: str) -> list[str]:
    """`"a,b"` -> ["a", "b"]; empty text: none. Raises ConfigError for a name that is not known."""
    names = [name for name in (word.strip() for word in text.split(",")) if name]
    if unknown := [name for name in names if name not in (allowed := list(known))]:
        raise ConfigError(f"unknown {what} {unknown[0]!r}; known are {', '.join(allowed)}")
    return names
