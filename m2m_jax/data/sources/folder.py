"""A folder of folders as a data set: every subfolder is one image set (`core/image_folder.py` says what is listed).

Images may differ in size, mode and aspect ratio. At start-up the files are listed and their headers read, so that most
of what cannot be used is named before training begins, in seconds for a hundred thousand images; to decode them all is
what `m2m_jax.data.check` is for. The files themselves are read when they are used.

Which sets are held out is told by a hash of their names: 5 % are of the split "validation", 5 % of "test", the others
of "train", and adding or removing sets moves none of them. Of 3 sets and more every split has at least one: where no
name falls into a split, the names nearest to it do (those with the smallest hashes), until an added set takes their
place, of which a resumed run tells. Two sets are one of "train" and one of both others; a single one is of all. "all"
is the whole folder, for evaluation on sets that no training has seen.
"""

import concurrent.futures
import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from m2m_jax.configuration import Data
from m2m_jax.core.errors import UserError, warn
from m2m_jax.core.image_folder import SetFolder, list_sets
from m2m_jax.core.images import check_header, read_bytes
from m2m_jax.data import records, splits
from m2m_jax.data.records import BadRecord
from m2m_jax.data.source import SOURCES, DataSource, RecordSource

MAX_CAPTION_BYTES = 1_000_000
SPLITS = (*splits.SPLITS, "all")
HELD_OUT_SHARE = 0.05  # of each of validation and test
KIND = "folder"
# Of the hash of names. The number is one with which sets that are merely numbered (000, set00, set000, ...) are held
# out by their own hashes from a dozen or two on, and need no neighbours.
_PERSON = b"m2m sets 251"
_THREADS = 16  # that read headers


class Files(Sequence[bytes]):
    """The contents of files, each read when it is asked for. Raises BadRecord for one that is gone."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        """Return the content of the file of a number. Slices are not asked for."""
        path = self._paths[index]
        if not path.is_file():
            raise BadRecord(f"{path}: no such file")
        return read_bytes(path)


@SOURCES.register("folder")
class FolderSource(DataSource):
    """A folder of folders of images, each of them a set."""

    @classmethod
    def open(cls, config: Data, split: str) -> RecordSource:
        strict, follow_links = config.on_error == "stop", config.follow_links
        return load(config.path, split, config.images_per_set, strict=strict, follow_links=follow_links)

    @classmethod
    def find(cls, path: pathlib.Path, *, follow_links: bool = False) -> list[RecordSource]:
        return [load(str(path), "all", strict=False, follow_links=follow_links)]


class FolderRecords(RecordSource):
    """The sets of one split. A set with a fault counts no images and raises BadRecord."""

    def __init__(
        self, path: str, split: str, sets: Sequence[tuple[SetFolder, str | BadRecord]], notes: Sequence[str] = ()
    ):
        """sets: each with its caption, or with the reason why it cannot be used."""
        self.name, self.split, self.notes = f"{path} ({split})", split, tuple(notes)
        self.kinds = [KIND] * len(sets)
        self.num_images = [0 if isinstance(caption, BadRecord) else len(one.files) for one, caption in sets]
        self._sets = sets
        self.fingerprint = _fingerprint(sets)

    def __getitem__(self, index: int) -> records.ImageSetRecord:
        one, caption = self._sets[index]
        if isinstance(caption, BadRecord):
            raise BadRecord(str(caption))
        return records.ImageSetRecord(
            set_id=one.name,
            kind=KIND,
            caption=caption,
            images=Files(one.files),
            origin=str(one.path),
            files=tuple(map(str, one.files)),
        )


def _fingerprint(sets: Sequence[tuple[SetFolder, str | BadRecord]]) -> str:
    """Return a hash of the names of sets and files and of the captions, by which a resumed run knows its listing."""
    listing = hashlib.sha256()
    for one, caption in sets:
        for text in (one.name, str(caption), *(file.name for file in one.files), ""):
            listing.update(_bytes(text) + b"\0")
    return listing.hexdigest()


def load(
    path: str, split: str, images_per_set: int = 1, *, strict: bool = True, follow_links: bool = False
) -> FolderRecords:
    """List the sets of a split of a folder of folders.

    Args:
      split: "train", "validation", "test" or "all", the whole folder.
      images_per_set: sets with fewer images are refused, if strict.
      strict: UserError for the first set or header that can't be used; otherwise that is found out where it is read.
      follow_links: whether links may lead out of the folder, see `list_sets`.

    Raises:
      UserError: something cannot be used; names it, and what to do about it.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: a folder has {', '.join(SPLITS)}")
    root = pathlib.Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"data.path={path!r}: no such folder")
    if not root.is_dir():
        raise UserError(f"data.path={path!r}: not a folder; name one with a subfolder of images for each set")
    sets, unused = list_sets(root, follow_links=follow_links)
    notes = [f"{path}: not used: {unused}"] if str(unused) else []
    if not sets:
        beside = f" ({unused})" if notes else ""
        raise UserError(f"data.path={path!r}: has no subfolders{beside}; each set of images needs one of its own")
    captioned = [_with_caption(one) for one in sets]
    if strict:
        # All splits are checked whichever is asked for: a bad file should not wait for the first evaluation.
        _require_usable(captioned, images_per_set)
    if split != "validation":  # of which a run has told with "train"
        for note in notes:
            warn(note)
    names = split_names([one.name for one in sets], split)
    return FolderRecords(path, split, [one for one in captioned if one[0].name in names], notes)


def split_names(names: Iterable[str], split: str) -> set[str]:
    """Return which sets, of all that a folder has, are of a split."""
    ordered = sorted(names, key=_place)
    if split == "all":
        return set(ordered)
    validation = sum(_place(name) < HELD_OUT_SHARE for name in ordered)
    test = sum(_place(name) < 2 * HELD_OUT_SHARE for name in ordered) - validation
    if len(ordered) < 3:
        held_out, train = ordered[:1], ordered[1:] or ordered
        return set(train if split == "train" else held_out)
    validation = min(max(validation, 1), len(ordered) - 2)
    test = min(max(test, 1), len(ordered) - validation - 1)
    first, last = {"train": (validation + test, None), "validation": (0, validation)}.get(
        split, (validation, validation + test)
    )
    return set(ordered[first:last])


def _place(name: str) -> float:
    """Return a number in [0, 1) that is a set's own, whatever other sets there are."""
    return int.from_bytes(hashlib.blake2b(_bytes(name), digest_size=8, person=_PERSON).digest(), "big") / 2**64


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # a file system holds bytes, which need not be text


def _require_usable(sets: Sequence[tuple[SetFolder, str | BadRecord]], images_per_set: int) -> None:
    for one, caption in sets:
        if isinstance(caption, BadRecord):
            raise UserError(str(caption))
        if len(one.files) < images_per_set:
            raise UserError(
                f"{one.path}: {len(one.files)} images, fewer than data.images_per_set={images_per_set}; "
                "add images, remove the folder or lower data.images_per_set"
            )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for one, _ in sets:
            for _ in pool.map(check_header, one.files):
                pass


def _with_caption(one: SetFolder) -> tuple[SetFolder, str | BadRecord]:
    try:
        if one.fault:
            raise BadRecord(one.fault)
        return one, read_caption(one.caption_file) if one.caption_file else ""
    except BadRecord as error:
        return one, error


def read_caption(file: pathlib.Path) -> str:
    """Return the text of a caption file on one line, without a byte-order mark.

    Raises:
      BadRecord: it is no text in UTF-8, holds a zero byte, or is longer than `MAX_CAPTION_BYTES`.
      UserError: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_CAPTION_BYTES:
        raise BadRecord(f"{file}: is longer than {MAX_CAPTION_BYTES} bytes, too long for a caption; shorten it")
    if b"\0" in data:
        raise BadRecord(f"{file}: has a zero byte, not readable as UTF-8 text; save it as UTF-8")
    try:
        return " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise BadRecord(f"{file}: not readable as UTF-8 text ({error}); save it as UTF-8") from error
