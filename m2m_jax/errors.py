"""Errors that are the user's to mend, and how a program reports them.

Imports nothing but absl, so that the sampler binary can use it without the training libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class UserError(ValueError):
    """Bad input: the message is one clear line that names the thing and the remedy."""


def run_program(
    main: Callable[[Sequence[str]], object],
    check_arguments: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Runs `main(argv)` with parsed absl flags; bad input ends in one line on stderr and exit code 2.

    `check_arguments(argv)` may refuse the raw command line with a UserError before absl reads it.
    Every other exception keeps its traceback: it is a fault of ours, and the traceback is the report.
    """

    def guarded(argv: Sequence[str]) -> object:
        try:
            return main(argv)
        except UserError as error:
            _refuse(error)

    def parse_flags(argv: Sequence[str]) -> list[str]:
        return _parse_flags(argv, check_arguments)

    app.run(guarded, flags_parser=parse_flags)


def _parse_flags(argv: Sequence[str], check_arguments: Callable[[Sequence[str]], None] | None) -> list[str]:
    try:
        # Who asks for help has nothing to be checked.
        if check_arguments and not any(a.lstrip("-").startswith("help") for a in argv[1:]):
            check_arguments(argv)
        rest = flags.FLAGS(argv)
        # Below absl's default, or Orbax reports every file it touches between our own lines.
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING
    except (UserError, flags.Error) as error:
        _refuse(error)
    if len(rest) > 1:
        _refuse(UserError(f"unexpected argument {rest[1]!r}: every option starts with --"))
    return rest


def _refuse(error: Exception) -> None:
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
