"""Caption files: read row by row, refused where they are damaged, and cleaned by rules that count what they drop.

| suffix   | what a row is                                                                                     |
|----------|---------------------------------------------------------------------------------------------------|
| .txt     | a line is a caption                                                                               |
| .tsv     | `url TAB caption` without a header (Conceptual 12M's layout), or with a header that names `caption` |
| .jsonl   | a line is a JSON object with the field `caption`                                                  |
| .parquet | a row has the column `caption`                                                                    |

`text` may stand for `caption`, in any case of letters. The first three may end in .gz, too. Text is UTF-8, fields of
.tsv are neither quoted nor escaped, and what is null is an empty caption.

A file that is not what its name says is refused with the number of the line: one bad line in a file that a program
wrote means that the program or the copy went wrong. What is a caption, but not one to make images from, is for
`CaptionRules` to drop and count.
"""

from __future__ import annotations

import array
import collections
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from m2m_jax.building.caption_rules import CaptionRules
from m2m_jax.core.errors import UserError
from m2m_jax.data.mis import digest

MAX_LINE_BYTES = 2**16  # of a line, in Parquet of a caption: more is no caption, but another kind of file
_COLUMNS = ("caption", "text")  # the first that is there
_PARQUET_ROWS = 2**14  # in memory at once


def clean_captions(
    captions: Iterable[str], rules: CaptionRules
) -> tuple[list[tuple[int, str]], collections.Counter[str]]:
    """Choose the captions to use, in the order of their file, and count how many each rule dropped.

    Returns [(number of the row, from 0; caption, its spaces made one)] and {rule: captions}. The number is that of the
    file, so that no rule changes the noise that another caption's images are made from. Raises UserError where none is
    left.
    """
    kept: list[tuple[int, str]] = []
    digests = array.array("Q")
    dropped: collections.Counter[str] = collections.Counter()
    for row, caption in enumerate(captions):
        spaced = " ".join(caption.split())
        rule = rules.broken_by(spaced)
        if rule is not None:
            dropped[rule] += 1
            continue
        kept.append((row, spaced))
        if rules.drop_duplicates:
            digests.append(digest(spaced))
    if rules.drop_duplicates and kept:
        # 8 bytes a caption, where a set of strings would need as much as the captions.
        first = np.sort(np.unique(np.frombuffer(digests, np.uint64), return_index=True)[1])
        if len(first) < len(kept):
            dropped["drop_duplicates"] = len(kept) - len(first)
            kept = [kept[i] for i in first]
    if not kept:
        reasons = ", ".join(f"{rule}: {count}" for rule, count in dropped.items()) or "there were none"
        raise UserError(f"no caption is left to make images from ({reasons}); change the captions or the rules")
    return kept, dropped


def read_captions(path: str | Path) -> Iterator[str]:
    """Return the captions of a file, one a row and in its order, as they stand there. See the top of this module.

    Raises UserError for a file of another kind at once, and for what is wrong in it when it is reached.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file of captions")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    reader = _READERS.get(suffix[0]) if suffix else None
    if reader is None or (packed and reader is _read_parquet):
        raise UserError(f"{path}: captions are read from .txt, .tsv, .jsonl (each also .gz) and .parquet files")
    return _not_empty(path, reader)


def _not_empty(path: Path, reader: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    empty = True
    for caption in reader(path):
        empty = False
        yield caption
    if empty:
        raise UserError(f"{path} holds no captions")


def _read_txt(path: Path) -> Iterator[str]:
    return _lines(path)


def _read_tsv(path: Path) -> Iterator[str]:
    layout = "url TAB caption, or fields under a header that names 'caption'"
    count, column = 2, 1
    for number, line in _rows(path):
        fields = line.split("\t")
        if number == 1 and "://" not in fields[0]:
            name = _caption_column(fields)
            if name is None:
                raise UserError(f"{path}, line 1: expected {layout}")
            count, column = len(fields), fields.index(name)
            continue
        if len(fields) != count:
            raise UserError(f"{path}, line {number}: has {len(fields)} fields, not {count}; expected {layout}")
        yield fields[column]


def _read_jsonl(path: Path) -> Iterator[str]:
    name = None
    for number, line in _rows(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        name = name or _caption_column(row)
        if name not in row:
            raise UserError(f"{path}, line {number}: has no field {name or 'caption'!r}")
        yield _text(row[name], f"{path}, line {number}, field {name!r}")


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa  # 40 MB that only this format needs
    import pyarrow.parquet

    errors = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last of names of columns
    with _refusing(path, *errors), pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        name = _caption_column(schema.names)
        if name is None:
            raise UserError(f"{path} has no column 'caption' or 'text', but {', '.join(schema.names)[:200]}")
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column {name!r} holds {kind}, not text")
        number = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[name]):
            for value in batch.column(0):
                number += 1
                where = f"{path}, row {number}"
                try:
                    caption = value.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8 ({error.reason})") from error
                yield _text(caption, where)


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _caption_column(names: Iterable[str]) -> str | None:
    by_name = {name.strip().lower(): name for name in names}
    return next((by_name[wanted] for wanted in _COLUMNS if wanted in by_name), None)


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, without blank ones at the end, which editors and `echo` leave there."""
    blank = 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip(" "):
            blank += 1
            continue
        yield from ((number - i, "") for i in range(blank, 0, -1))
        blank = 0
        yield number, line


def _lines(path: Path) -> Iterator[str]:
    r"""Yield lines of UTF-8 without their ends, \n or \r\n; captions may have other characters that end lines."""
    packed = path.suffix.lower() == ".gz"
    with (
        _refusing(path, OSError, EOFError, zlib.error),
        io.BufferedReader(gzip.open(path)) if packed else path.open("rb") as file,
    ):
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(data) > MAX_LINE_BYTES:
                raise UserError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; that is no caption")
            if b"\0" in data:
                raise UserError(f"{path}, line {number}: has a zero byte; captions are text in UTF-8")
            try:
                line = data.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 (byte {error.start} of the line)") from error
            line = line.removesuffix("\n").removesuffix("\r")
            yield line.removeprefix("\ufeff") if number == 1 else line


def _text(value: object, where: str) -> str:
    """Return a caption from a typed field. Null is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {type(value).__name__} in the place of text")
    if value.isascii():
        size = len(value)
    else:
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: half of a surrogate pair is no character") from error
    if size > MAX_LINE_BYTES:
        raise UserError(f"{where}: longer than {MAX_LINE_BYTES} bytes; that is no caption")
    if "\0" in value:
        raise UserError(f"{where}: has a zero byte; captions are text in UTF-8")
    return value


@contextlib.contextmanager
def _refusing(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Raise what a library says of a damaged file as a UserError."""
    try:
        yield
    except errors as error:
        raise UserError(f"{path} cannot be read ({str(error) or type(error).__name__})") from error
