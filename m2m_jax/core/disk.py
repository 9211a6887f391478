"""Files and folders that appear whole or not at all, and what a full or read-only disk says, in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from m2m_jax.core.errors import UserError

UNFINISHED = ".partial"  # how a name ends while what it names is written
# Ours: processes of several hosts, or containers, may have one number.
_ME = f"{os.getpid()}-{secrets.token_hex(4)}"
_TRIES = 10  # to write a file that other processes write alike

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
    errno.EISDIR,
    errno.ENOENT,
    errno.EEXIST,
)


def reason(error: BaseException | None) -> str:
    """Return what the disk said, of an error or of what caused it; an empty text where it was not the disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CODES:
            return error.strerror or str(error)
        # TensorStore and array_record raise ValueError and RuntimeError with the system's words in it.
        for code in _CODES:
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def errors(what: str | Path, more: str = "") -> Iterator[None]:
    """Make what the disk says a UserError: `what` cannot be written, why, and `more`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Whatever an OSError says, also what is not in the table: a name that is too long, for one. But not that
        # something took too long (Orbax's word, too): that passes, and starting again mends it.
        if isinstance(error, OSError) and not isinstance(error, TimeoutError | ConnectionError):
            why: str | None = error.strerror or str(error)
        else:
            why = reason(error)
        if why:
            raise UserError(f"{what} cannot be written: {why}{more}") from error
        raise


def run_errors(what: str | Path) -> contextlib.AbstractContextManager[None]:
    """Handle `errors` of what a run writes."""
    return errors(what, "; what was saved before is whole, and the run goes on from there when it is started again")


def require_plain(path: Path, flag: str) -> None:
    """Raise UserError where libraries would take a folder's absolute path for a pattern or a URL, or cannot take it.

    Orbax and TFDS look for files by patterns, Grain reads FILE[1:5] as a part of a file, etils takes /gs: for a bucket,
    and a backslash escapes: what they write there they may not find again.

    Args:
        flag: what the path was given as, with dashes.
    """
    whole = str(path.absolute())
    found = sorted({*whole} & {*"*?[]\\"}) + [part for part in path.absolute().parts if part.endswith(":")]
    if found:
        raise UserError(
            f"{flag}={path}: what is written there would not be found again, for {whole} has {found[0]!r} in it; "
            "name another folder"
        )
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{flag}={str(path)!a}: the name of that folder is not UTF-8, which libraries need; name another"
        ) from None


def unfinished(path: Path) -> Path:
    """Return what to write in the place of `path`, beside it, and then to `finish`."""
    return path.with_name(f".{path.name}.{_ME}{UNFINISHED}")


def finish(aside: Path, path: Path) -> None:
    """Give a file its name, once its content is on the disk. Raises OSError."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def sha256(path: Path, flush: bool = False) -> str:
    """Return a file's SHA-256, in hexadecimal. flush: it is on the disk, not in a cache, afterwards. Raises OSError."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what processes left that were killed while they wrote what has that name; None: whatever they wrote."""
    leftovers = re.compile(rf"\.{'.*' if name is None else re.escape(name)}\.[^.]+{re.escape(UNFINISHED)}")
    for path in folder.iterdir():
        if not leftovers.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a file to write, which replaces `path` in the end, or is removed if anything goes wrong. Raises OSError."""
    aside = unfinished(path)
    try:
        yield aside
        finish(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a file, also where other processes write it alike at the same time. Raises OSError."""
    for tries_left in reversed(range(_TRIES)):
        try:
            with new_file(path) as aside:
                aside.write_bytes(data)
            return
        except OSError as error:  # taken for a leftover by another process, perhaps of another host
            gone = error.errno in (errno.ENOENT, errno.ESTALE)
            if not gone or not tries_left or not path.parent.is_dir():
                raise


def require_new(path: Path) -> None:
    """Raise UserError where there is something already: before work is done that could not be written."""
    if path.exists() or path.is_symlink():
        raise UserError(f"--output={path} exists already; remove it or name another folder")


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which is removed in the end. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    aside = unfinished(path)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` in the end, or is removed if anything fails. Raises UserError."""
    require_new(path)
    with errors(f"--output={path}"), folder_aside(path) as aside:
        yield aside
        aside.rename(path)
