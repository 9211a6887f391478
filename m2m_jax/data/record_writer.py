"""Write one array_record file, whole or not at all; the same records make the same bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from array_record.python.array_record_module import ArrayRecordWriter

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError


class RecordWriter:
    """Call `finish`, or `abandon` if anything went wrong; as a context manager it does so itself."""

    def __init__(self, path: Path):
        """Raise UserError, as all methods do, where the disk is full or cannot be written."""
        self._path, self._aside = path, disk.unfinished(path)
        with disk.errors(path):
            disk.remove_leftovers(path.parent, path.name)
            self._writer = ArrayRecordWriter(str(self._aside), "group_size:1")

    def write(self, serialized: bytes) -> None:
        with disk.errors(self._path):
            self._writer.write(serialized)

    def finish(self) -> None:
        """Give the file its name. Raises UserError where another process began it, too."""
        with disk.errors(self._path):
            self._writer.close()
            try:
                disk.finish(self._aside, self._path)
            except FileNotFoundError:  # taken for a leftover by the other
                raise UserError(
                    f"{self._path} is written by two processes: give each a --process_index of its own"
                ) from None

    def abandon(self) -> None:
        """Leave nothing."""
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self.finish()
        else:
            self.abandon()
