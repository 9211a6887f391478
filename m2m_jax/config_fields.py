"""What a configuration is made of: groups of typed fields, each with its help, its limits and its choices.

A field that holds one of several words names the table in which they stand, as "module:NAME": a `Registry`, or another
mapping or tuple. The module is imported when the words are needed, and not before. So a word stands once, beside what
it chooses, in a layer above this one; nothing is imported from there to read or change a config; and what a user's own
config file registers is known like everything else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from m2m_jax.core.errors import UserError
from m2m_jax.core.field_types import described, is_of
from m2m_jax.core.fields import MAX_NUMBER, About
from m2m_jax.core.paths import expand_home
from m2m_jax.core.registry import nearest


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a group, or of the options of a registered thing: its type, its default and what is known of it."""

    kind: Any
    default: Any
    about: About

    @property
    def is_group(self) -> bool:
        """Whether this is a group of further fields."""
        return isinstance(self.kind, type) and issubclass(self.kind, Group)

    def accept(self, value: Any, name: str) -> Any:
        """Return `value` as the field holds it: a list as a tuple, a whole number as a float where one is due.

        Args:
          name: the dotted name of the field, for messages.

        Raises:
          UserError: the value is of another type.
        """
        if self.is_group and not isinstance(value, self.kind):
            raise UserError(f"config.{name} is a group of fields; set one, as --config.{name}.NAME=VALUE")
        value = tuple(value) if isinstance(value, list) else value
        if self.about.path and isinstance(value, str) and value.startswith("~"):
            value = str(expand_home(value))
        if not self.is_group and not is_of(value, self.kind):
            raise UserError(f"config.{name} is {value!r:.80}; it takes {described(self.kind)}, as in {self.default!r}")
        return _with_floats(value, self.kind)

    def read(self, text: str, name: str) -> Any:
        """Return the value that a command line means by `text`: 7, True, a/path, (16, 32), style,content.

        Raises:
          UserError: no value of the field's type is written so.
        """
        if get_origin(self.kind) is not tuple:
            return self.accept(_read_one(text, self.kind), name)
        text = text.strip()
        items = [item.strip() for item in (text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text).split(",")]
        items = items[:-1] if not items[-1] else items  # (1,) and ()
        return self.accept(tuple(_read_one(_unquoted(item), get_args(self.kind)[0]) for item in items), name)

    def check(self, value: Any, name: str) -> None:
        """Raise UserError where a value is outside of the field's limits or none of its choices."""
        if value == () and self.default:
            raise UserError(f"config.{name} is (); it takes at least one item, as in {self.default!r}")
        self.about.check(value, f"config.{name}")


def field(default: Any, help: str, **about: Any) -> Any:
    """Return a dataclass field with a default, its help, and more of `About`.

    Example:
        steps: int = field(25, "Denoising steps an image.", low=1)
    """
    return dataclasses.field(default=default, metadata={"about": About(help, **about)})


def options_of(name: str, help: str) -> Any:
    """Return a dataclass field, {option: value}, for the `Options` of the thing that the field `name` chooses."""
    return dataclasses.field(default_factory=dict, metadata={"about": About(help, options_of=name)})


def fields_of(cls: type) -> dict[str, Field]:
    """Return {name: field} of a dataclass, in its order."""
    return _fields_of(cls)


@functools.cache
def _fields_of(cls: type) -> dict[str, Field]:
    kinds = get_type_hints(cls)
    return {
        one.name: Field(kinds[one.name], one.default, one.metadata.get("about", About("")))
        for one in dataclasses.fields(cls)
    }


class UnknownField(UserError, AttributeError):
    """A config has no field of that name."""


@dataclasses.dataclass
class Group:
    """A group of a configuration's fields: a base of dataclasses. `prefix` stands before its fields' names.

    A name that no field has, and a value of another type than the field's, raise UserError when they are set; limits
    and choices are looked at by `config_rules.validate`.

    Example:
        @dataclasses.dataclass
        class Profile(Group, prefix="profile."):
            steps: tuple[int, int] = field((0, 0), "First and last step of a trace.", low=0)

        Profile().step = (3, 5)  # UnknownField: unknown config field config.profile.step; did you mean ...
    """

    prefix: ClassVar[str] = ""
    # {what a field was called: (its name, {value of before: value})}.
    formerly: ClassVar[Mapping[str, tuple[str, Mapping[Any, Any]]]] = MappingProxyType({})

    def __init_subclass__(cls, prefix: str = "", **arguments: Any):
        super().__init_subclass__(**arguments)
        cls.prefix = prefix

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.formerly:
            name, value = self.today(name, value)
        if name not in fields_of(type(self)):
            raise self._unknown(name)
        object.__setattr__(self, name, fields_of(type(self))[name].accept(value, self.name_of(name)))

    def __getattr__(self, name: str) -> Any:
        raise self._unknown(name)

    def _unknown(self, name: str) -> UnknownField:
        return unknown_field(self.name_of(name), names_of(type(self)))

    @classmethod
    def today(cls, name: str, value: Any) -> tuple[str, Any]:
        """Return what a field of before is called today, and its value. Raises UserError for what it never was."""
        today, values = cls.formerly[name]
        if not isinstance(value, str) or value not in values:
            raise UserError(f"config.{cls.name_of(name)} is {value!r:.60}; it must be one of {', '.join(values)}")
        return today, values[value]

    @classmethod
    def name_of(cls, name: str) -> str:
        """Return the dotted name of a field, from the root of the config."""
        return cls.prefix + name

    def update(self, changes: Mapping[str, Any] = MappingProxyType({}), **fields: Any) -> None:
        """Set several fields: {"train.steps": 100}, {"train": {"steps": 100}} or, of the group itself, steps=100.

        Raises:
          UserError: there is no field of such a name, or it takes no such value.
        """
        for name, value in {**changes, **fields}.items():
            first, _, rest = name.partition(".")
            part = getattr(self, first) if rest or isinstance(value, Mapping) else None
            if isinstance(part, Group):
                part.update({rest: value} if rest else value)
            elif rest and isinstance(part, dict):
                setattr(self, first, part | {rest: value})
            elif rest:
                raise self._unknown(name)
            else:
                setattr(self, first, value)

    def check(self) -> None:
        """Raise UserError where fields of this group do not go together."""


def names_of(cls: type[Group]) -> Iterator[str]:
    """Yield the dotted names of the fields of a group, and of the groups in it."""
    for name, one in fields_of(cls).items():
        yield cls.name_of(name)
        if one.is_group:
            yield from names_of(one.kind)


def unknown_field(name: str, names: Iterator[str]) -> UnknownField:
    """Return the error that says that `name` is none of `names`, and which is the nearest."""
    return UnknownField(f"unknown config field config.{name}{nearest(name, names, 'config.')}")


def groups_in(group: Group) -> Iterator[Group]:
    """Yield a group, and every group in it."""
    yield group
    for name, one in fields_of(type(group)).items():
        if one.is_group:
            yield from groups_in(getattr(group, name))


def flatten(group: Group) -> dict[str, Any]:
    """Return {dotted name: value} of the fields of a group and of every group in it."""
    return {
        part.name_of(name): getattr(part, name)
        for part in groups_in(group)
        for name, one in fields_of(type(part)).items()
        if not one.is_group
    }


def chosen(group: Group, name: str) -> Any:
    """Return the thing that a field chooses by its word; None where it is only a word."""
    return fields_of(type(group))[name].about.table.get(getattr(group, name))


def given_options(group: Group, name: str = "options") -> dict[str, Any]:
    """Return the options that are set of the thing that a group chooses: {option: value}, of the option's type.

    A registered class has options where it has a dataclass `Options` of `field`s; `Data.options` are those of the
    source that `data.name` chooses.

    Raises:
      UserError: the thing has no such option, or the option takes no such value.
    """
    chooser = fields_of(type(group))[name].about.options_of
    known, found = options_known(group, name), {}
    for option, value in getattr(group, name).items():
        whole = f"{group.name_of(name)}.{option}"
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            owner = f"{group.name_of(chooser)}={getattr(group, chooser)}"
            raise UserError(f"config.{whole}: {owner} has no such option{nearest(option, known) or ';'} {there}")
        one = known[option]
        text = isinstance(value, str) and not is_of(value, one.kind)  # of a command line
        found[option] = one.read(value, whole) if text else one.accept(value, whole)
        one.check(found[option], whole)
    return found


def options(group: Group, name: str = "options") -> Any:
    """Return the `Options` of the thing that a group chooses, with what is set of them. Raises as `given_options`."""
    chooser = fields_of(type(group))[name].about.options_of
    return chosen(group, chooser).Options(**given_options(group, name))


def options_known(group: Group, name: str) -> dict[str, Field]:
    """Return the options that there are of the thing that a group chooses: {option: field}."""
    cls = getattr(chosen(group, fields_of(type(group))[name].about.options_of), "Options", None)
    return fields_of(cls) if cls else {}


def _with_floats(value: Any, kind: Any) -> Any:
    """Return `value` with whole numbers as floats, where the type says float and they are not too large for any use."""
    if get_origin(kind) is tuple:
        return tuple(_with_floats(item, get_args(kind)[0]) for item in value)
    return float(value) if kind is float and type(value) is int and abs(value) <= MAX_NUMBER else value


_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _read_one(text: str, kind: Any) -> Any:
    """Return the value of a simple type that `text` stands for; `text` where it stands for none."""
    if get_origin(kind) in (Union, UnionType):
        values = [_read_one(text, one) for one in get_args(kind)]
        return next((value for value in values if not isinstance(value, str)), text)
    try:
        if kind is int:
            return int(text, 0 if text[:2].lower() in ("0x", "0o", "0b") else 10)
        if kind is float:
            return float(text)
    except ValueError:
        return text
    if kind is bool:
        return _BOOLS.get(text.lower(), text)
    return None if kind is type(None) and text.lower() == "none" else text


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
