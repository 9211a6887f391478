"""Named choices: a thing registers under a name; configs, flags, limits and messages read the names from here."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

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

    def __init__(self, kind: str, package: str | None = None):
        """Make an empty registry.

        Args:
          kind: what is registered, a noun for messages ("stepper").
          package: all of its modules are imported before a name is looked up: what lies in it is registered.
        """
        self.kind = kind
        self._package = package
        self._registered: dict[str, T] = {}
        self._by: dict[str, dict[str, Any]] = {}  # the module that registered each, as its globals

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds a class or function under `name`, and gives it back unchanged.

        A module that is run again, as a config file is that is read twice, replaces what it registered.

        Raises:
          ValueError: the name is taken.
        """
        module = sys._getframe(1).f_globals
        before = self._by[name] if name in self._registered else None
        if before is not None and (before is module or before["__name__"] != module["__name__"]):
            raise ValueError(f"there is a {self.kind} {name!r} already, of {before['__name__']}")

        def add(thing: T) -> T:
            self._registered[name], self._by[name] = thing, module
            return thing

        return add

    def choose(self, name: str) -> T:
        """Return what is registered under `name`.

        Raises:
          UserError: nothing is; names what is there.
        """
        if name not in self:
            there = ", ".join(self)
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self) or ';'} there are {there}")
        return self[name]

    @property
    def _things(self) -> dict[str, T]:
        """What is registered, once the modules of the package are imported."""
        package, self._package = self._package, None  # at once: the modules may look up names themselves
        if package:
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
        return self._registered

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
