"""What Orbax and TensorStore say of it once too often."""

from __future__ import annotations

import logging
import sys

from m2m_jax.core import disk


def say_once() -> None:
    """Keep from the terminal the traces of a save that failed: Orbax raises the same error to whoever waits for it."""
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(_is_awaited)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _is_news(record: logging.LogRecord) -> bool:
    raised_too = record.funcName in ("run", "_thread_func", "wait_until_finished") and "orbax" in record.pathname
    return not (record.exc_info and raised_too)


def _is_awaited(record: logging.LogRecord) -> bool:
    # One array could not be written, which is raised; nobody waits for what became of the others.
    return not (record.exc_info and "never retrieved" in record.getMessage() and disk.reason(record.exc_info[1]))


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # Likewise, of those whose writing ends after that of the one that failed.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
