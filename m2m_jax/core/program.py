"""How every `python -m m2m_jax...` starts, reads its flags, and ends on bad input.

A program is a page: flags, `main`, `run_program`. It imports what it calls within `main`, so that `--help` answers
before JAX is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard, TypeVar

from absl import app, flags, logging

from m2m_jax.core import options
from m2m_jax.core.errors import UserError, refuse, tell
from m2m_jax.core.printing import refuse_lost_output, safe_streams

flags.disclaim_key_flags()  # --help of a program lists what `define_flags` defines for it
T = TypeVar("T", bound=options.Options)
GOODBYE = 10  # seconds that a process which failed waits for the others of its launch


def run_program(
    main: Callable[[Sequence[str]], object],
    take: Callable[[Sequence[str]], list[str]] | None = None,
    arguments: int = 0,
) -> None:
    """Run `main(argv)` with parsed flags, and end the process with the exit code that `main` returns.

    Bad input ends in one line on stderr and exit code 2. Every other exception keeps its traceback: it is a fault of
    ours, and the traceback is the report. Of the processes of a launch one that fails ends likewise, by itself.
    Printing never fails (`safe_streams`).

    Args:
      main: imports and calls what does the work, and prints.
      take: returns what of the command line is left for absl (`ConfigFlag.take`), and may refuse it with a UserError.
      arguments: so many may stand beside the flags; `argv[1:]` are those.
    """

    def guarded(argv: Sequence[str]) -> object:
        try:
            return main(argv)
        except Exception as error:
            if _refused_by_jax(error):
                error = UserError(f"JAX cannot start with this environment: {error}")
            if _refused_by_system(error):
                error = UserError(f"{error.filename}: {error.strerror}")
            jax = sys.modules.get("jax")
            if jax and jax.distributed.is_initialized():
                _end_one_of_several(error)
            if isinstance(error, UserError):
                refuse(error)
            raise

    def parse_flags(argv: Sequence[str]) -> list[str]:
        rest = _parse_flags(argv, take)
        if len(rest) > 1 + arguments:
            refuse(UserError(f"unexpected argument {rest[1 + arguments]!r}: every option starts with --"))
        return rest

    with safe_streams():
        app.run(guarded, flags_parser=parse_flags)


def define_flags(kind: type[T], renamed: Mapping[str, str] | None = None) -> Callable[[], T]:
    """Define a flag for each field of `kind`, a dataclass of options, and return what makes one of the flags' values.

    To be called where a program is imported, and what it returns, once flags are parsed; that may raise UserError.

    Args:
      renamed: {field: its flag}, where the names differ.
    """
    names = {field.name: (renamed or {}).get(field.name, field.name) for field, _ in options.fields(kind)}
    holders = {field.name: _define(names[field.name], field, what) for field, what in options.fields(kind)}
    return lambda: kind(**{name: holder.value for name, holder in holders.items()})


def _define(name: str, field: dataclasses.Field, kind: options.Kind) -> flags.FlagHolder:
    required = field.default is dataclasses.MISSING
    default: Any = None if required else str(field.default) if isinstance(field.default, Path) else field.default
    about = field.metadata["about"]
    help = f"{about.help}{' Must be given.' * required}"
    if kind.several:
        return flags.DEFINE_list(name, default and list(default), help, required=required)
    if about.choices and not isinstance(about.choices, str):  # a table is too slow to import for --help
        return flags.DEFINE_enum(name, default, list(about.words), help, required=required)
    numbers: dict[Any, Callable[..., flags.FlagHolder]] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
    }
    return numbers.get(kind.type, flags.DEFINE_string)(name, default, help, required=required)


def command_line(module: str, without: Sequence[str] = ()) -> str:
    """Return the command that called this program, for a message or a record, without some of its flags."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        if argument.lstrip("-").partition("=")[0] not in without:
            kept.append(argument)
        elif "=" not in argument:
            next(arguments, None)  # its value
    return shlex.join(["python", "-m", module, *kept])


def _refused_by_jax(error: Exception) -> bool:
    """Say whether JAX could not be imported for a variable of the environment: it leaves half of its modules."""
    return isinstance(error, ValueError) and "jax._src" in sys.modules and "jax" not in sys.modules


def _refused_by_system(error: Exception) -> TypeGuard[OSError]:
    """Say whether a path cannot be looked at, wherever that was: not for us to mend, nor by starting again."""
    codes = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
    return isinstance(error, OSError) and error.filename is not None and error.errno in codes


def _end_one_of_several(error: Exception) -> NoReturn:
    """Report an error and end this process.

    At exit JAX would wait for all processes, for five minutes, and then abort, whatever the exit code was to be.
    """
    if isinstance(error, UserError):
        tell(error)
    else:
        traceback.print_exception(error)
    # Others that fail alike, at the same moment, end with their own codes, too, where all say goodbye.
    goodbye = threading.Thread(target=_say_goodbye, daemon=True)
    goodbye.start()
    goodbye.join(GOODBYE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def _say_goodbye() -> None:
    with contextlib.suppress(Exception):
        sys.modules["jax"].distributed.shutdown()


def _parse_flags(argv: Sequence[str], take: Callable[[Sequence[str]], list[str]] | None) -> list[str]:
    try:
        rest = read_flags(argv, take)
    except UserError as error:
        refuse(error)
    # Below absl's default, or Orbax reports every file it touches between our own lines.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]  # absl gives all flags one type
    return rest


def mark_flags_parsed() -> None:
    """Let libraries ask for flags of their own where no program has parsed any, as in a notebook: they get defaults."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def read_flags(
    argv: Sequence[str],
    take: Callable[[Sequence[str]], list[str]] | None,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> list[str]:
    """Set the flags, and return the program's name and what stands beside the flags. Raises UserError."""
    if take:
        argv = take(argv)
    try:
        return flag_values(argv)
    except SystemExit:  # after help, for which absl exits with 1
        refuse_lost_output()
        sys.exit(0)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except ValueError as error:  # absl's words for --noNAME=VALUE
        if "does not take an argument" not in str(error):
            raise
        raise UserError(str(error)) from error
