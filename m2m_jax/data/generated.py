"""Generated sets on disk: `m2m_jax.generate` writes them, `m2m_jax.score` and `data.name=generated` read them.

    DIR/generated.json                                  what made the sets, and which there are; written first
    DIR/generated-00000-of-00012.array_record  ...      sets, as in `records.py`: the given images, then the made ones
    DIR/SET/000.png  001.png  ...  caption.txt          in place of records, where folders were asked for

A shard of records, and a folder of a set, is written aside and renamed when it is whole. The sets are complete where
all of them have their names.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from m2m_jax.core import disk
from m2m_jax.core.comparing import first_difference
from m2m_jax.core.errors import UserError
from m2m_jax.core.image_folder import CAPTION_FILE
from m2m_jax.data import precomputed, records
from m2m_jax.data.shards import count_records

VERSION = 1
MANIFEST = "generated.json"
REMEDY = "remove what is damaged and call m2m_jax.generate as before, which makes it again"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `generated.json` says.

    Attributes:
      version: of this layout, `VERSION`.
      made_by: all that decides what the images are: hashes of model and data, settings, seed; what JSON holds.
      given, num_images: images of each set that were given, and that were made.
      image_size: pixels a side.
      format: one of `records.FORMATS`.
      sets_per_shard: in every shard but the last.
      set_ids, kinds: of each set, in order.
      attributes: {name: numbers an image} of every record.
      made_from: where model and data were; for people.
    """

    version: int
    made_by: dict[str, Any]
    given: int
    num_images: int
    image_size: int
    format: str
    sets_per_shard: int
    set_ids: list[str]
    kinds: list[str]
    attributes: dict[str, int]
    made_from: dict[str, str]

    @property
    def shards(self) -> list[range]:
        """Which sets are in each shard."""
        total, length = len(self.set_ids), self.sets_per_shard
        return [range(first, min(first + length, total)) for first in range(0, total, length)]

    def check(self) -> None:
        """Raise ValueError for what `m2m_jax.generate` does not write, of what reading depends on."""
        most = records.MAX_IMAGES_PER_RECORD
        for name, low, high in (("given", 0, most), ("num_images", 1, most), ("sets_per_shard", 1, 2**48)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r:.40}")
        for names in (self.set_ids, self.kinds):
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError("set_ids, kinds")
        if len(self.set_ids) != len(self.kinds) or self.format not in records.FORMATS:
            raise ValueError("kinds, format")
        widths = self.attributes.values() if isinstance(self.attributes, dict) else (0,)
        if not all(type(width) is int and 1 <= width <= 2**16 for width in widths):
            raise ValueError("attributes")


def start(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, or find it there.

    Raises:
      UserError: the folder holds sets that were made otherwise, or something else, or cannot be written.
    """
    disk.require_plain(directory, "--output")
    path = directory / MANIFEST
    with disk.errors(f"--output={directory}"):
        if not path.exists():
            names = sorted(os.listdir(directory)) if directory.exists() else []
            # Another process may have begun meanwhile.
            others = [name for name in names if not name.endswith(disk.UNFINISHED) and name != MANIFEST]
            if others:
                raise UserError(f"{directory} holds {others[0]}, not generated sets: name another --output")
            directory.mkdir(parents=True, exist_ok=True)
            disk.write(path, f"{json.dumps(dataclasses.asdict(manifest))}\n".encode())
    found, wanted = (dataclasses.asdict(one) | {"made_from": None} for one in (read_manifest(directory), manifest))
    if (different := first_difference(found, json.loads(json.dumps(wanted)))) is not None:
        raise UserError(f"{directory} holds sets that were made otherwise: {different}; name another --output")


def read_manifest(directory: str | Path) -> Manifest:
    """Return what `generated.json` says. Raises UserError where there is none, or it is damaged."""
    path = Path(directory) / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        if manifest.version != VERSION:
            raise UserError(f"{path} is of version {manifest.version!r:.40}, not {VERSION}: generate the sets again")
        manifest.check()
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: make the sets with python -m m2m_jax.generate") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r:.200}): remove its folder and generate again") from error


def is_done(directory: Path, manifest: Manifest, shard: int) -> bool:
    """Say whether a shard is there and whole; its records are counted, and not read."""
    numbers = manifest.shards[shard]
    if manifest.format == "records":
        return count_records(shard_path(directory, manifest, shard)) == len(numbers)
    return all(set_folder(directory, manifest.set_ids[number]).is_dir() for number in numbers)


def all_named(directory: Path, manifest: Manifest) -> bool:
    """Say whether all shards have their names, by one look at the folder."""
    if manifest.format == "records":
        wanted = {shard_path(directory, manifest, shard).name for shard in range(len(manifest.shards))}
    else:
        wanted = {set_folder(directory, set_id).name for set_id in manifest.set_ids}
    return wanted <= set(os.listdir(directory))


def write_shard(directory: Path, manifest: Manifest, shard: int, sets: Iterable[records.ImageSetRecord]) -> None:
    """Write one shard; what has its name is whole.

    Args:
      sets: with PNGs, in the order of the manifest.

    Raises:
      UserError: the disk is full or cannot be written.
    """
    if manifest.format == "records":
        precomputed.write_shard(shard_path(directory, manifest, shard), sets)
        return
    for record in sets:
        path = set_folder(directory, record.set_id)
        with disk.errors(f"--output={directory}"):
            if path.is_dir():
                continue
            aside = disk.unfinished(path)
            aside.mkdir()
            for number, image in enumerate(record.images):
                (aside / f"{number:03d}.png").write_bytes(image)
            if record.caption:
                (aside / CAPTION_FILE).write_text(record.caption, encoding="utf-8")
            aside.rename(path)


def shard_path(directory: Path, manifest: Manifest, shard: int) -> Path:
    """Return the file of a shard of records."""
    return directory / f"generated-{shard:05d}-of-{len(manifest.shards):05d}.array_record"


def set_folder(directory: Path, set_id: str) -> Path:
    """Return the folder of a set, whatever its name."""
    name = quote(set_id, safe=" !#$&'()+,;=@[]^{}~")
    return directory / (f"%2E{name[1:]}" if name.startswith(".") else name)


def set_id(folder: str) -> str:
    """Return which set a folder is of."""
    return unquote(folder)
