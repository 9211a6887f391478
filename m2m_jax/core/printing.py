"""Printing that cannot end a program: its reader may go away, its disk may be full, a name may be in no encoding."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from m2m_jax.core.errors import UserError, refuse, warn


class SafeStream:
    """Write to a text stream until it fails, and to nowhere from then on.

    Example:
        stream = SafeStream(sys.stdout)
        print("text", file=stream)  # never an OSError
        stream.error  # what went wrong, if anything

    Attributes:
      error: the first error; None while all is well.
    """

    def __init__(self, stream: TextIO, name: str):
        """name: of the stream, for messages."""
        self._stream, self._name = stream, name
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        # What the stream still holds is written when Python ends, and would fail once more.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self.lost:
            warn(f"{self._name} cannot be written: {error.strerror or error}; the work goes on without it")

    @property
    def lost(self) -> bool:
        """Whether something that was printed is missing, and not because its reader wanted no more."""
        return self.error is not None and not isinstance(self.error, BrokenPipeError)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Make printing to stdout and stderr safe for what runs within, however it ends.

    What is printed to a pipe that was closed (`| head -1`) is dropped without a word, as `tee` does. Where stdout was
    lost otherwise, to a full disk, work that ended well exits with 2 and one line. Names of files that are no text are
    printed as their bytes, and other characters that the terminal's encoding lacks as escapes.
    """
    _open_what_is_closed()
    codecs.register_error("as_bytes", _as_bytes)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        _safe(stream, name) for stream, name in zip(before, ("standard output", "standard error"))
    )
    try:
        yield
        refuse_lost_output()
    except SystemExit as end:
        if not end.code:
            refuse_lost_output()
        raise
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def refuse_lost_output() -> None:
    """End the program with 2 where stdout was lost."""
    sys.stdout.flush()
    if isinstance(sys.stdout, SafeStream) and sys.stdout.lost:
        error = sys.stdout.error
        why = (error and error.strerror) or error
        refuse(UserError(f"standard output could not be written: {why}; all else is done"))


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def say_progress(line: str, done: int, total: int) -> None:
    """Print how far something is to stderr: on one line of a terminal, or a few whole lines in a log."""
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % 5000 == 0 or done == total:
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a time for people: "2 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _open_what_is_closed() -> None:
    """Open /dev/null in the place of standard streams that are closed: the next file would get their number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _safe(stream: TextIO | None, name: str) -> SafeStream:
    if stream is None:
        stream = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="as_bytes")
    with contextlib.suppress(OSError, ValueError):
        os.set_blocking(stream.fileno(), True)  # a reader that is slow is waited for
    return SafeStream(stream, name)


def _as_bytes(error: UnicodeError) -> tuple[bytes, int]:
    """Encode what an encoding lacks: bytes of file names (PEP 383) as themselves, the rest as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    encoded = (
        bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else c.encode("ascii", "backslashreplace") for c in found
    )
    return b"".join(encoded), error.end
