"""Folders of image files, listed in one way for training, `data.check` and sampling: what is used, and what is not.

    DIR/
      teapots/   a.jpg  b.PNG  c.webp  caption.txt      a set: every subfolder is one
      chairs/    ...

Names that begin with a dot, and the folders `__MACOSX` that archives of macOS bring along, are passed over. Whatever
else is not used (files of other types, folders within sets, images beside the sets) is counted, for a report.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import SUFFIXES
from m2m_jax.core.paths import natural_order

CAPTION_FILE = "caption.txt"
_ARCHIVE_FOLDER = "__MACOSX"
_NESTED, _BESIDE = "folders within sets", "images beside the sets"


@dataclasses.dataclass(frozen=True)
class SetFolder:
    """One subfolder as a set: its image files in the order of their names.

    fault: why it cannot be used, in one line; `files` is empty then.
    """

    path: Path
    files: tuple[Path, ...] = ()
    caption_file: Path | None = None
    fault: str | None = None

    @property
    def name(self) -> str:
        return self.path.name


class Unused:
    """What a listing passes over: how much of each kind, and an example of it.

    Example:
        str(unused)    "files .heic: 12 (set01/a.heic, ...), images beside the sets: 1 (b.png)"; empty: nothing
    """

    def __init__(self, root: Path):
        self._root = root
        self._counts: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, Path] = {}

    def add(self, kind: str, path: Path) -> None:
        """Count `path` as one of `kind`, a noun in the plural."""
        self._counts[kind] += 1
        self._examples.setdefault(kind, path.relative_to(self._root))

    def __str__(self) -> str:
        return ", ".join(
            f"{kind}: {count} ({self._examples[kind]}{', ...' if count > 1 else ''})"
            for kind, count in sorted(self._counts.items())
        )


def list_sets(root: Path, *, follow_links: bool = False) -> tuple[list[SetFolder], Unused]:
    """Return the subfolders of `root` as sets, by name, and what is not used of all that lies there.

    Args:
      follow_links: whether links may lead out of `root`. Without it a set with such a link has a fault: a folder from
        elsewhere must not read what lies outside. Only files that are named like images, and `caption.txt`, are ever
        read through a link, one level of folders deep, and nothing is written.

    Raises:
      UserError: a folder cannot be read.
    """
    unused, sets = Unused(root), []
    for entry in _entries(root):
        if entry.is_dir():
            if entry.name == _ARCHIVE_FOLDER:
                unused.add(f"folders {_ARCHIVE_FOLDER}", entry)
            else:
                sets.append(_list_set(entry, root, follow_links, unused))
        elif is_image_name(entry):
            unused.add(_BESIDE, entry)
    return sets, unused


def list_images(folder: Path) -> list[Path]:
    """Return the image files directly in `folder`, by name, following links. Raises UserError if it cannot be read."""
    return list(_list_set(folder, folder, True, Unused(folder)).files)


def is_image_name(path: Path) -> bool:
    """Say whether a file of this name is taken for an image."""
    return path.suffix.lower() in SUFFIXES


def _entries(folder: Path) -> list[Path]:
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        return sorted(entries, key=lambda entry: natural_order(Path(entry.name)))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _list_set(folder: Path, root: Path, follow_links: bool, unused: Unused) -> SetFolder:
    if not follow_links and _leads_out(folder, root):
        return SetFolder(folder, fault=_outside(folder, root))
    files, caption_file = [], None
    for entry in _entries(folder):
        if entry.is_dir():
            unused.add(f"folders {_ARCHIVE_FOLDER}" if entry.name == _ARCHIVE_FOLDER else _NESTED, entry)
            continue
        is_caption = entry.name == CAPTION_FILE
        if not (is_caption or is_image_name(entry)):
            unused.add(f"files {entry.suffix.lower() or 'without a suffix'}", entry)
            continue
        if not entry.is_file():
            unused.add("names of no file", entry)
            continue
        if not follow_links and _leads_out(entry, root):
            return SetFolder(folder, fault=_outside(entry, root))
        if is_caption:
            caption_file = entry
        else:
            files.append(entry)
    if not files:
        return SetFolder(folder, fault=f"{folder}: no images ({', '.join(SUFFIXES)}); add some or remove it")
    return SetFolder(folder, tuple(files), caption_file)


def _leads_out(path: Path, root: Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(root.resolve())


def _outside(path: Path, root: Path) -> str:
    return (
        f"{path}: is a link to {path.resolve()}, outside of {root}; allow such links with "
        "--config.data.follow_links=True, or put a copy or a hard link in its place"
    )
