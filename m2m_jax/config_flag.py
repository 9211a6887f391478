"""`--config=FILE[:PRESET]` and `--config.GROUP.FIELD=VALUE`, for every program that reads a configuration.

    CONFIG = define_config_flag()

    def main(argv):
        validate(CONFIG.value)

    run_program(main, CONFIG.take)

A config file is Python: its `get_config(preset)` returns a `Config`. It may register things of its own, a data source
or a stepper, and then name them.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from m2m_jax.config_fields import (
    Field,
    Group,
    fields_of,
    given_options,
    groups_in,
    names_of,
    options_known,
    unknown_field,
)
from m2m_jax.configuration import Config
from m2m_jax.core.errors import UserError
from m2m_jax.core.field_types import described
from m2m_jax.core.registry import Registry

flags.disclaim_key_flags()  # --help of a program lists --config among its own

EXAMPLE = "for example --config=configs/emoji.py:demo"
HELP = "Config file and preset, as in configs/emoji.py:demo. Beside it, --help lists all fields: --config.NAME=VALUE."


class ConfigFlag:
    """The config of a command line.

    Attributes:
      value: the config, once `take` has read the command line.
    """

    def __init__(self, flag_values: flags.FlagValues, required: bool):
        self.value: Any = None
        self._flag_values, self._required = flag_values, required
        flags.DEFINE_string("config", None, HELP, flag_values=flag_values)

    def take(self, argv: Sequence[str]) -> list[str]:
        """Return the command line without `--config` and its overrides, and set `value` to the config that they mean.

        Where help is asked for, the fields become flags, for its list; without a config there are none to list.

        Raises:
          UserError: the file, the preset or a field does not exist, or a field takes no such value.
        """
        rest, file, overrides = _parted(argv)
        helps = any(re.match("--?help", argument) for argument in argv[1:])
        if file is None and (helps or not (self._required or overrides)):
            return rest
        if file is None:
            raise UserError(f"no config; name one, {EXAMPLE}")
        self.value = load_config(file)
        for name, text in overrides.items():
            _override(self.value, name, text)
        for group in groups_in(self.value):
            for name, one in fields_of(type(group)).items():
                if one.about.options_of and getattr(group, name):
                    setattr(group, name, given_options(group, name))  # typed
        if helps:
            self._define_fields()
        return rest

    def _define_fields(self) -> None:
        module = self._flag_values.find_module_defining_flag("config")
        for name, text in _listed(self.value):
            flags.DEFINE_string(f"config.{name}", None, text, flag_values=self._flag_values, module_name=module)


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS, *, required: bool = True) -> ConfigFlag:
    """Define `--config` of a program, and return what reads it and its overrides.

    required: whether there must be a config; without one `value` is None.
    """
    return ConfigFlag(flag_values, required)


def load_config(file: str) -> Config:
    """Return the config of FILE[:PRESET].

    Raises:
      UserError: there is no such file or preset, or no config in it.
    """
    path, _, preset = file.partition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path!r}; name one, {EXAMPLE}")
    # By its place: two files of one name are two modules, and a file that is read again registers its things anew.
    name = f"config file {Path(path).resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no config file: its name does not end in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path} is no config file: line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is no config file: it has no get_config")
    config = module.get_config(preset)
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config gives no Config; start from default_config()")
    return config


def _parted(argv: Sequence[str]) -> tuple[list[str], str | None, dict[str, str]]:
    """Return what is not the config's, FILE[:PRESET], and {field: text}; of --config.NAME alone the text is True."""
    rest, file = list(argv[:1]), None
    overrides: dict[str, str] = {}
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            file = match[1] if match[1] is not None else next(arguments, "")
        elif match := re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL):
            no, name, text = match.groups()
            if no and text is not None:
                raise UserError(f"--noconfig.{name} takes no value: it means --config.{name}=False")
            one = _field(name)
            if text is None and not no and (one is None or one.kind is not bool):
                text = next(arguments, None)
                if text is None:
                    raise UserError(f"--config.{name} lacks a value")
            overrides[name] = "False" if no else text if text is not None else "True"
        else:
            rest.append(argument)
    return rest, file, overrides


def _field(name: str) -> Field | None:
    """Return the field of a dotted name; None where there is none, as of options."""
    cls, one = Config, None
    for part in name.split("."):
        one = fields_of(cls).get(part) if isinstance(cls, type) and issubclass(cls, Group) else None
        if one is None:
            return None
        cls = one.kind
    return one


def _override(config: Config, name: str, text: str) -> None:
    """Set a field, or one of the options of what a group chooses, to the value that a text means."""
    *groups, last = name.split(".")
    group: Group = config
    for depth, part in enumerate(groups, 1):
        one = fields_of(type(group)).get(part)
        if one and one.about.options_of and depth == len(groups):
            setattr(group, part, getattr(group, part) | {last: text})
            return
        if one is None or not one.is_group:
            raise unknown_field(name, names_of(Config))
        group = getattr(group, part)
    one = fields_of(type(group)).get(last)
    if last in group.formerly:
        setattr(group, last, text)
        return
    if one is None:
        raise unknown_field(name, names_of(Config))
    if one.about.options_of:
        raise UserError(f"config.{name} is a group of options; set one, as --config.{name}.NAME=VALUE")
    setattr(group, last, one.read(text, name))


def _listed(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the dotted name of every field and option, and its help."""
    for group in groups_in(config):
        for name, one in fields_of(type(group)).items():
            if one.about.options_of:
                given = getattr(group, name)
                for option, its in options_known(group, name).items():
                    yield f"{group.name_of(name)}.{option}", _help(its, given.get(option, its.default))
            elif not one.is_group:
                yield group.name_of(name), _help(one, getattr(group, name))


def _help(one: Field, value: object) -> str:
    """Return the help of a field: what it is, its words and what they choose, its type, limits and value."""
    about, lines = one.about, [one.about.help]
    if about.choices:
        lines.append(f"One of {', '.join(about.words)}.")
    if isinstance(about.table, Registry):
        # An instance has the docstring of its class.
        documented = {word: inspect.getdoc(x) for word, x in about.table.items() if hasattr(x, "__qualname__")}
        lines += [f"{word}: {text.splitlines()[0]}" for word, text in documented.items() if text]
    kind = ", ".join(filter(None, [described(one.kind), about.limits]))
    here = "" if one.default == value else f"here {value!r}, "
    return "\n".join([*lines, f"({kind}; {here}default {one.default!r})"])
