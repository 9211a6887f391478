"""`--config=FILE[:PRESET]` and its overrides, for every program that reads a configuration."""

from __future__ import annotations

import re
import runpy
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m2m_jax.configuration import flatten
from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import nearest

flags.disclaim_key_flags()  # --help of a program lists --config among its own


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines `--config=FILE[:PRESET]` and its overrides; `check_arguments` says what is wrong with them."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file and preset: configs/emoji.py:demo", lock_config=True, flag_values=flag_values
    )


def check_arguments(argv: Sequence[str]) -> None:
    """Raises UserError for a config file, a preset or a field that does not exist.

    For `run_program(main, check_arguments)`: ml_collections reports these three with tracebacks, so they are
    looked for before it reads the command line.
    """
    where = next((i for i, argument in enumerate(argv) if re.match(r"--?config(=|$)", argument)), None)
    if where is None:
        raise UserError("no config; name one, for example --config=configs/emoji.py:demo")
    value = argv[where].partition("=")[2] if "=" in argv[where] else "".join(argv[where + 1 : where + 2])
    path, _, preset = value.partition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path!r}; name one, for example --config=configs/emoji.py:demo")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(f"{path} is no config file: it has no get_config")
    fields = flatten(get_config(preset))

    for argument in argv:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match and match[2] not in fields:
            if any(name.startswith(match[2] + ".") for name in fields):
                raise UserError(f"config.{match[2]} is a group of fields; set one, as --config.{match[2]}.NAME=VALUE")
            raise UserError(f"unknown config field config.{match[2]}{nearest(match[2], fields, 'config.')}")


def check_arguments_if_given(argv: Sequence[str]) -> None:
    """Check as `check_arguments` does, where a config or a field of one is named at all."""
    if any(re.match(r"--?(no)?config\b", argument) for argument in argv[1:]):
        check_arguments(argv)
