"""How every `python -m m2m_jax...` starts, how it ends on bad input, and how it says how long something takes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from m2m_jax.core.errors import UserError, refuse, tell

GOODBYE = 10  # seconds that a process which failed waits for the others of its launch


def run_program(
    main: Callable[[Sequence[str]], object],
    take: Callable[[Sequence[str]], list[str]] | None = None,
    arguments: int = 0,
) -> None:
    """Runs `main(argv)` with parsed absl flags; bad input ends in one line on stderr and exit code 2.

    `arguments`: so many may stand beside the flags; `argv[1:]` are those.
    `take(argv)` gives back what of the command line is left for absl, and may refuse it with a UserError.
    Every other exception keeps its traceback: it is a fault of ours, and the traceback is the report.
    Of the processes of a launch one that fails ends likewise, by itself.
    """

    def guarded(argv: Sequence[str]) -> object:
        try:
            return main(argv)
        except Exception as error:
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

    app.run(guarded, flags_parser=parse_flags)


def _end_one_of_several(error: Exception) -> NoReturn:
    """Reports it and ends this process.

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
        flags.FLAGS.verbosity = logging.WARNING
    return rest


def read_flags(
    argv: Sequence[str],
    take: Callable[[Sequence[str]], list[str]] | None,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> list[str]:
    """Sets the flags and returns the program's name and what stands beside the flags. Raises UserError."""
    if take:
        argv = take(argv)
    try:
        return flag_values(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except ValueError as error:  # absl's words for --noNAME=VALUE
        if "does not take an argument" not in str(error):
            raise
        raise UserError(str(error)) from error


def duration(seconds: float) -> str:
    """For people: "2 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
