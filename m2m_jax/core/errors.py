"""Errors that are the user's to mend, and how a program reports them. Imports nothing."""

from __future__ import annotations

import sys
from typing import NoReturn


class UserError(ValueError):
    """Bad input: the message is one clear line that names the thing and the remedy."""


def one_line(error: Exception) -> str:
    """Return what an error says, for a message; of one that says nothing, its type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def warn(text: str) -> None:
    """Print a line on stderr about what a program goes on with."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def tell(error: Exception) -> None:
    """Print a line on stderr about what a program ends with."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)


def refuse(error: Exception) -> NoReturn:
    """End the program with one line on stderr and exit code 2."""
    tell(error)
    sys.exit(2)
