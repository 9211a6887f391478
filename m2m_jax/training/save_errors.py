"""What a full or read-only disk looks like through Orbax and TensorStore, and what of it is said once too often."""

from __future__ import annotations

import errno
import logging
import os
import sys

# What is the disk's fault and not ours.
_CODES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.ENOENT,
)


def reason(error: BaseException | None) -> str:
    """What the disk said, of an error or of what caused it; an empty text where it was not the disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CODES:
            return error.strerror or str(error)
        # TensorStore, which writes the arrays, raises a ValueError with the system's words in it.
        for code in _CODES:
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


def say_once() -> None:
    """Keeps from the terminal the traces of a save that failed: Orbax raises the same error to whoever waits for it."""
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(_is_awaited)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _is_news(record: logging.LogRecord) -> bool:
    raised_too = record.funcName in ("run", "_thread_func", "wait_until_finished") and "orbax" in record.pathname
    return not (record.exc_info and raised_too)


def _is_awaited(record: logging.LogRecord) -> bool:
    # One array could not be written, which is raised; nobody waits for what became of the others.
    return not (record.exc_info and "never retrieved" in record.getMessage() and reason(record.exc_info[1]))


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # Likewise, of those whose writing ends after that of the one that failed.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
