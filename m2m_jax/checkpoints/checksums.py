"""SHA256SUMS: what every file of a checkpoint was when it was saved. `sha256sum -c SHA256SUMS` in its folder reads it.

It is written before the checkpoint's folder gets its name, so a folder with the name has it. A folder is divided into
items, which are its subfolders; files beside them are not looked at (Orbax keeps its own notes there, and finishes them
later).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m2m_jax.core import disk

FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+/[^\n]+)")
_THREADS = 8  # hashing and reading wait for neither each other nor Python


def write(folder: Path) -> None:
    """Write FILE for all files of the items in `folder`, each of which is on the disk, not in a cache, afterwards.

    Raises OSError where the disk is full or a file cannot be read.
    """
    names = sorted(name for item in folder.iterdir() if item.is_dir() for name in _files(folder, item.name))
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: disk.sha256(folder / name, flush=True), names))
    lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    disk.write(folder / FILE, "".join(lines).encode())


def damage(folder: Path, items: Iterable[str], share: tuple[int, int] = (0, 1)) -> str:
    """Return what is wrong with these items of `folder`, by item and file; an empty text if they are whole.

    Args:
      share: (i, n): the contents of every n-th file, from the i-th, are read. What is missing or extra is always seen.
    """
    try:
        listed = _read(folder / FILE)
    except FileNotFoundError:
        return f"it has no {FILE}, so it was not saved to its end, or by a version before there was one"
    except (OSError, ValueError) as error:
        return f"{FILE} cannot be read: {error}"
    problems, shared = [], []
    for item in items:
        expected = {name for name in listed if name.startswith(f"{item}/")}
        found = _files(folder, item)
        if not expected or not found:
            problems.append(f"item {item} is missing" if not found else f"item {item} is not in {FILE}")
            continue
        problems += [f"{_named(name)} is missing" for name in sorted(expected - found)]
        problems += [f"{_named(name)} is extra: it was not saved with the others" for name in sorted(found - expected)]
        shared += sorted(expected & found)

    def changed(name: str) -> str:
        try:
            same = (folder / name).is_file() and disk.sha256(folder / name) == listed[name]
        except OSError as error:
            return f"{_named(name)} cannot be read: {error.strerror or error}"
        return "" if same else f"{_named(name)} is not what was saved, by its SHA-256"

    index, count = share
    with ThreadPoolExecutor(_THREADS) as pool:
        problems += filter(None, pool.map(changed, shared[index::count]))
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _read(path: Path) -> dict[str, str]:
    """Return {name: digest}. Raises ValueError for what `write` cannot have written."""
    *lines, end = path.read_text(encoding="utf-8").split("\n")
    matches = [match for line in lines if (match := _LINE.fullmatch(line))]
    if end or len(matches) < len(lines):
        raise ValueError("it is damaged")
    return {match[2]: match[1] for match in matches}


def _files(folder: Path, item: str) -> set[str]:
    """Everything in an item that is no folder, relative to `folder`."""
    return {
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder / item)
        for name in names
    }


def _named(name: str) -> str:
    item, _, rest = name.partition("/")
    return f"item {item}: file {rest}"
