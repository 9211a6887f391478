"""Named choices: a thing registers under a name; configs, flags, limits and messages read the names from here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from m2m_jax.core.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Map names to things of one kind, in the order in which they registered themselves.

    Example:
        STEPPERS = Registry[Callable[[NoiseSchedule, int], StepTable]]("stepper")

        @STEPPERS.register("ddim")
        def ddim(schedule, num_steps): ...

        STEPPERS.choose("ddmi")  # UserError: unknown stepper 'ddmi'; did you mean ddim? there are ddim, euler
    """

    def __init__(self, kind: str):
        """kind: what is registered, a noun for messages ("stepper")."""
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds a class or function under `name`, and gives it back unchanged.

        Raises:
          ValueError: the name is taken.
        """
        if name in self._things:
            raise ValueError(f"there is a {self.kind} {name!r} already")

        def add(thing: T) -> T:
            self._things[name] = thing
            return thing

        return add

    def choose(self, name: str) -> T:
        """Return what is registered under `name`.

        Raises:
          UserError: nothing is; names what is there.
        """
        if name not in self._things:
            there = ", ".join(self._things)
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self._things) or ';'} there are {there}")
        return self._things[name]

    def __getitem__(self, name: str) -> T:
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return '; did you mean X?', or an empty text where no name is near. prefix: stands before X."""
    names = list(names)
    matches = difflib.get_close_matches(name, names, 1, 0.6)
    # A field put into the wrong group (config.steps) is near to no whole name, but its last part is one.
    matches = matches or [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""
