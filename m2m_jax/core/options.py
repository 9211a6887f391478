"""Options of a program as fields of a frozen dataclass: the one list for its command line, its help, and Python.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SetExport(Options):
        output: Path = option("Folder to write; must not exist.")
        num_sets: int = option("How many sets.", 12, low=1)

    SetExport(output="~/sets")                # from Python: the same defaults, and the same checks
    OPTIONS = define_flags(SetExport)         # in a program: --output, --num_sets (core/program.py)

Needs nothing beyond Python, so that `--help` answers before JAX is imported.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from m2m_jax.core.errors import UserError
from m2m_jax.core.fields import MAX_NUMBER, About
from m2m_jax.core.paths import expand_home

MAX_SEED = MAX_NUMBER
_KINDS = {int: Integral, float: Real}  # NumPy's numbers are of these, too


def option(help: str, default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """Return a field of an `Options` dataclass: its help, a default unless one must be given, and more of `About`."""
    return dataclasses.field(default=default, metadata={"about": About(help, **about)})


class Kind(NamedTuple):
    """What an option holds.

    Attributes:
      type: str, int, float, bool or Path.
      several: whether it is a tuple of these; on a command line commas part them.
    """

    type: type
    several: bool


class Options:
    """Check and convert the fields of a frozen dataclass when it is made: a base class.

    Paths are expanded (`~`) and become `Path`, lists become tuples; an empty text stands for no path.

    Raises:
      UserError: a value out of its limits, by the name of its flag.
    """

    def __post_init__(self):
        for field, kind in fields(type(self)):
            object.__setattr__(self, field.name, _checked(field, kind, getattr(self, field.name)))

    def explicit(self) -> dict[str, Any]:
        """Return {name: value} of those that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def all_optional(options: type[Options]) -> type[Options]:
    """Return a class of the same options, each None unless it is given."""
    hints = get_type_hints(options)
    optional = [
        (field.name, hints[field.name] | None, dataclasses.field(default=None, metadata=field.metadata))
        for field, _ in fields(options)
    ]
    namespace = {"__module__": options.__module__}
    return dataclasses.make_dataclass(
        f"Chosen{options.__name__}", optional, bases=(Options,), namespace=namespace, frozen=True, kw_only=True
    )


def fields(options: type) -> Iterator[tuple[dataclasses.Field, Kind]]:
    """Yield the fields of an `Options` class, and what each holds."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if get_origin(hint) is UnionType:
            hint = next(one for one in get_args(hint) if one is not NoneType)
        several = get_origin(hint) is tuple
        yield field, Kind(get_args(hint)[0] if several else hint, several)


def split_list(text: str) -> list[str]:
    """Return the items that commas part; an item with a comma stands in double quotes.

    Raises:
      ValueError: the quotes do not match.
    """
    try:
        return [item.strip() for row in csv.reader([text], strict=True) for item in row]
    except csv.Error as error:
        raise ValueError(f"{text}: {error}") from error


def _checked(field: dataclasses.Field, kind: Kind, value: Any) -> Any:
    if kind.several:
        if value is None:
            return None
        return tuple(_checked_one(field, kind.type, item) for item in ((value,) if isinstance(value, str) else value))
    return _checked_one(field, kind.type, value)


def _checked_one(field: dataclasses.Field, kind: type, value: Any) -> Any:
    name, about = f"--{field.name}", field.metadata["about"]
    if kind is Path:
        if value is not None and str(value):
            return expand_home(value)
        if field.default is not dataclasses.MISSING:
            return None
        raise UserError(f"{name} is empty: {about.help}")
    if value is None and field.default is None:
        return None
    if kind is float and isinstance(value, str | int):
        try:
            value = float(value)
        except ValueError as error:
            raise UserError(f"{name}={value}: {error}") from None
    if not isinstance(value, _KINDS.get(kind, kind)):
        raise UserError(f"{name} is {value!r:.80}; it takes a value of type {kind.__name__}")
    about.check(value, name)
    return value
