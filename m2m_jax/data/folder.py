"""A folder of folders as a data set: every subfolder is one image set.

    DIR/
      teapots/   a.jpg  b.PNG  c.webp  caption.txt
      chairs/    ...

Images may differ in size, mode and aspect ratio. At start-up the files are listed and their headers read, so that most
of what cannot be used is named before training begins, in seconds for a hundred thousand images; to decode them all is
what `m2m_jax.data.check` is for. The files themselves are read when they are used.

Links are followed within DIR alone (DIR itself may be one): a folder from elsewhere must not read what lies outside.
"""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import SUFFIXES, check_header, read_bytes
from m2m_jax.data import records
from m2m_jax.data.records import BadRecord

CAPTION_FILE = "caption.txt"
MAX_CAPTION_BYTES = 1_000_000
VALIDATION_SHARE = 0.1
KIND = "folder"
_THREADS = 16  # that read headers


@dataclasses.dataclass(frozen=True)
class SetFiles:
    """One subfolder. fault: why it can't be used; files is empty then."""

    name: str
    files: tuple[pathlib.Path, ...]
    caption: str
    fault: str | None = None


class Files(Sequence):
    """The contents of files, each read when it is asked for. Raises BadRecord for one that is gone."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        path = self._paths[index]
        if not path.is_file():
            raise BadRecord(f"{path}: no such file")
        return read_bytes(path)


class FolderRecords:
    """The sets of one split: a `pipeline.RecordSource`. A set with a fault counts no images and raises BadRecord."""

    def __init__(self, name: str, sets: list[SetFiles]):
        self.name = name
        self.kinds, self.has_images = [KIND] * len(sets), True
        self.num_images = [len(one.files) for one in sets]
        self._sets = sets

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, index: int) -> records.ImageSetRecord:
        one = self._sets[index]
        if one.fault:
            raise BadRecord(one.fault)
        return records.ImageSetRecord(
            set_id=one.name,
            kind=KIND,
            caption=one.caption,
            images=Files(one.files),
            origin=str(one.files[0].parent),
            files=tuple(map(str, one.files)),
        )


def load(path: str, split: str | None, images_per_set: int = 1, *, strict: bool = True) -> FolderRecords:
    """Lists a folder of folders.

    split: "train", or "validation" (or "test", the same): about a tenth of the sets, chosen by their names.
        A folder with a single set uses it for both. None: all sets.
    images_per_set: sets with fewer images are refused, if strict.
    strict: UserError for the first set or header that can't be used; otherwise that is found out where it is read.
    Raises UserError naming what cannot be used and what to do about it.
    """
    if split not in ("train", "validation", "test", None):
        raise UserError(f"split {split!r}: a folder has train and validation")
    root = pathlib.Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"data.path={path!r}: no such folder")
    if not root.is_dir():
        raise UserError(f"data.path={path!r}: not a folder; name one with a subfolder of images for each set")
    subfolders = sorted(entry for entry in _entries(root) if entry.is_dir() and not _hidden(entry))
    if not subfolders:
        raise UserError(f"data.path={path!r}: has no subfolders; each set of images needs one of its own")
    sets = {subfolder.name: _list_set(subfolder, root) for subfolder in subfolders}
    if strict:
        # Both splits are checked whichever is asked for: a bad file should not wait for the first evaluation.
        _require_usable(sets.values(), root, images_per_set)
    chosen = sorted(sets if split is None else _train_names(sets) if split == "train" else _validation_names(sets))
    return FolderRecords(f"{path} ({split})" if split else path, [sets[name] for name in chosen])


def _require_usable(sets: Sequence[SetFiles], root: pathlib.Path, images_per_set: int) -> None:
    for one in sets:
        if one.fault:
            raise UserError(one.fault)
        if len(one.files) < images_per_set:
            raise UserError(
                f"{root / one.name}: {len(one.files)} images, fewer than data.images_per_set={images_per_set}; "
                "add images, remove the folder or lower data.images_per_set"
            )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for one in sets:
            for _ in pool.map(check_header, one.files):
                pass


def _validation_names(names: Sequence[str]) -> set[str]:
    num_held_out = max(1, round(VALIDATION_SHARE * len(names)))
    return set(sorted(names, key=lambda name: hashlib.blake2s(_bytes(name)).digest())[:num_held_out])


def _train_names(names: Sequence[str]) -> set[str]:
    return set(names) - _validation_names(names) if len(names) > 1 else set(names)


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # a file system holds bytes, which need not be text


def _hidden(path: pathlib.Path) -> bool:
    return path.name.startswith(".")


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _list_set(subfolder: pathlib.Path, root: pathlib.Path) -> SetFiles:
    def faulty(fault: str) -> SetFiles:
        return SetFiles(subfolder.name, (), "", fault)

    if _leads_out(subfolder, root):
        return faulty(_outside(subfolder, root))
    files, caption = [], subfolder / CAPTION_FILE
    for entry in sorted(_entries(subfolder)):
        if _hidden(entry) or not (entry.suffix.lower() in SUFFIXES or entry == caption) or not entry.is_file():
            continue
        if _leads_out(entry, root):
            return faulty(_outside(entry, root))
        if entry != caption:
            files.append(entry)
    if not files:
        return faulty(f"{subfolder}: no images ({', '.join(SUFFIXES)}); add some or remove it")
    try:
        return SetFiles(subfolder.name, tuple(files), _read_caption(caption))
    except BadRecord as error:
        return faulty(str(error))


def _leads_out(path: pathlib.Path, root: pathlib.Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(root.resolve())


def _outside(path: pathlib.Path, root: pathlib.Path) -> str:
    return f"{path}: is a link to {path.resolve()}, outside of {root}; put a copy or a hard link in its place"


def _read_caption(file: pathlib.Path) -> str:
    if not file.is_file():
        return ""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_CAPTION_BYTES + 1)
        if len(data) > MAX_CAPTION_BYTES:
            raise BadRecord(f"{file}: is longer than {MAX_CAPTION_BYTES} bytes, too long for a caption; shorten it")
        return " ".join(data.decode("utf-8").split())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadRecord(f"{file}: not readable as UTF-8 text ({error}); save it as UTF-8") from error
