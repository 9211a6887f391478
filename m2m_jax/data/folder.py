"""A folder of folders as a data set: every subfolder is one image set.

    DIR/
      teapots/   a.jpg  b.PNG  c.webp  caption.txt
      chairs/    ...

Images may differ in size, mode and aspect ratio. Everything is read and decoded once at start-up, so that
what cannot be used is named before training begins; the encoded files stay in memory.
"""

import hashlib
import pathlib

from m2m_jax.data import records
from m2m_jax.errors import UserError
from m2m_jax.images import SUFFIXES, decode_image

CAPTION_FILE = "caption.txt"
VALIDATION_SHARE = 0.1
KIND = "folder"


class FolderRecords:
    """The sets of one split, in memory: a `pipeline.RecordSource`."""

    def __init__(self, name: str, sets: list[records.ImageSetRecord]):
        self.name = name
        self.kinds = [KIND] * len(sets)
        self.num_images = [one.num_images for one in sets]
        self._sets = sets

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, index: int) -> records.ImageSetRecord:
        return self._sets[index]


def load(path: str, split: str, images_per_set: int) -> FolderRecords:
    """Reads a folder of folders.

    split: "train", or "validation" (or "test", the same): about a tenth of the sets, chosen by their names.
        A folder with a single set uses it for both.
    images_per_set: sets with fewer images are refused.
    Raises UserError naming what cannot be used and what to do about it.
    """
    if split not in ("train", "validation", "test"):
        raise UserError(f"split {split!r}: a folder has train and validation")
    root = pathlib.Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"data.path={path!r}: no such folder")
    if not root.is_dir():
        raise UserError(f"data.path={path!r}: not a folder; name one with a subfolder of images for each set")
    subfolders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not _hidden(entry))
    if not subfolders:
        raise UserError(f"data.path={path!r}: has no subfolders; each set of images needs one of its own")
    # Both splits are checked whichever is asked for: a bad file should not wait for the first evaluation.
    sets = {subfolder.name: _read_set(subfolder, images_per_set) for subfolder in subfolders}
    chosen = sorted(_validation_names(list(sets)) if split != "train" else _train_names(list(sets)))
    return FolderRecords(f"{path} ({split})", [sets[name] for name in chosen])


def _validation_names(names: list[str]) -> set[str]:
    num_held_out = max(1, round(VALIDATION_SHARE * len(names)))
    return set(sorted(names, key=lambda name: hashlib.blake2s(name.encode()).digest())[:num_held_out])


def _train_names(names: list[str]) -> set[str]:
    return set(names) - _validation_names(names) if len(names) > 1 else set(names)


def _hidden(path: pathlib.Path) -> bool:
    return path.name.startswith(".")


def _read_set(subfolder: pathlib.Path, images_per_set: int) -> records.ImageSetRecord:
    files = sorted(
        entry
        for entry in subfolder.iterdir()
        if entry.is_file() and not _hidden(entry) and entry.suffix.lower() in SUFFIXES
    )
    if not files:
        raise UserError(f"{subfolder}: no images ({', '.join(SUFFIXES)}); add some or remove it")
    if len(files) < images_per_set:
        raise UserError(
            f"{subfolder}: {len(files)} images, fewer than data.images_per_set={images_per_set}; "
            "add images, remove the folder or lower data.images_per_set"
        )
    images = []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        decode_image(data, str(file))
        images.append(data)
    return records.ImageSetRecord(
        set_id=subfolder.name, kind=KIND, caption=_read_caption(subfolder), images=tuple(images)
    )


def _read_caption(subfolder: pathlib.Path) -> str:
    file = subfolder / CAPTION_FILE
    if not file.is_file():
        return ""
    try:
        return " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as UTF-8 text ({error})") from error
