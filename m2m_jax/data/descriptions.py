"""Read the JSON files that say what is in a data set, and check what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from m2m_jax.core.errors import UserError

MAX_SIDE = 2**16  # of images and latents, pixels
T = TypeVar("T")


def read_description(path: Path, make: Callable[..., T], version: int, remedy: str) -> T:
    """Return what a file says.

    Args:
      make: called with the fields of its JSON object; ValueError, KeyError, TypeError or AttributeError: it is damaged.
      version: that the file must be of, where it names one.
      remedy: ends messages.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read, is damaged, or of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("version", version) != version:
            raise UserError(f"{path} is of version {values['version']!r}, not {version}: {remedy}")
        return make(**values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r:.200}): {remedy}") from error


def is_whole(value: Any, low: int, high: int) -> bool:
    """Say whether a value is a whole number between two."""
    return type(value) is int and low <= value <= high
