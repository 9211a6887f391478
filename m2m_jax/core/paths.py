"""Paths as people write them: in flags, in fields of a config, and in calls from Python."""

from __future__ import annotations

import re
from pathlib import Path

from m2m_jax.core.errors import UserError


def expand_home(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced by that home folder.

    A shell does so only at the beginning of a word: `--output=~/x` reaches a program as it stands.

    Raises:
      UserError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no home folder for ~ to stand for; write the whole path") from None


def natural_order(path: Path) -> tuple:
    """Return a key that sorts paths as people count: 2.png before 10.png."""
    # Of the parts of a name every second one is a number, so that texts are compared with texts.
    names = (re.split(r"(\d+)", name) for name in path.parts)
    return tuple([int(part) if i % 2 else part for i, part in enumerate(name)] for name in names), str(path)
