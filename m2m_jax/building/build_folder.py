"""Write what `mis.py` describes: every file whole or not at all, by any number of processes."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from m2m_jax.core import disk
from m2m_jax.core.comparing import first_difference
from m2m_jax.core.errors import UserError
from m2m_jax.data import mis, records
from m2m_jax.data.mis import Build, Manifest, Shard, ShardReport
from m2m_jax.data.record_writer import RecordWriter
from m2m_jax.data.splits import SPLITS


def start(directory: str | Path, build: Build) -> None:
    """Write `build.json`, or find it there.

    Raises UserError where the folder holds another build or something else, or cannot be written.
    """
    disk.require_plain(Path(directory), "--output")
    path = mis.folder(directory) / mis.BUILD
    with disk.errors(f"--output={directory}"):
        if not path.exists():
            # Another process may have begun meanwhile.
            others = [x for x in _names(path.parent) if not x.endswith(disk.UNFINISHED) and x != mis.BUILD]
            if others:
                raise UserError(f"{path.parent} holds {others[0]}, and no build of this program: name another --output")
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_json(path, build)
    there = mis.read_build(directory)
    wanted = json.loads(json.dumps(dataclasses.asdict(build)))
    found = dataclasses.asdict(there)
    for values in (wanted, found):
        values.pop("command")
    if (different := first_difference(found, wanted)) is not None:
        raise UserError(f"{path} is of another build: {different}; name another --output, or remove {path.parent}")


def finish(directory: str | Path, build: Build) -> Manifest | None:
    """Write TFDS's files and the manifest if all shards are done; None if some are not.

    The same whoever calls it: several processes may, at once. Raises UserError where the rules have dropped all sets.
    """
    if not all_there(directory, build):
        return None
    shards, reports = build.shards, []
    for shard in shards:
        try:
            reports.append(mis.read_report(directory, shard))
            size = (mis.folder(directory) / shard.name).stat().st_size
        except (UserError, OSError):
            return None
        if size != reports[-1].num_bytes:
            return None
    splits = {split: [report for shard, report in zip(shards, reports) if shard.split == split] for split in SPLITS}
    splits = {split: found for split, found in splits.items() if found}
    manifest = Manifest(
        version=mis.VERSION,
        settings=build.settings,
        sets=sum(len(report.num_images) for report in reports),
        images=sum(sum(report.num_images) for report in reports),
        dropped={
            "captions": build.dropped_captions,
            "images": _total(report.dropped_images for report in reports),
            "sets": _total(report.dropped_sets for report in reports),
        },
        splits=splits,
    )
    path = mis.folder(directory)
    if not manifest.sets:
        raise UserError(f"{path}: the rules have dropped all sets ({manifest.dropped}); remove it, and relax them")
    with disk.errors(path):
        _write_tfds(path, splits)
        _write_json(path / mis.MANIFEST, manifest)
        disk.remove_leftovers(path)
    return manifest


def all_there(directory: str | Path, build: Build) -> bool:
    """Say whether all shards and their reports have their names, by one look at the folder, however many there are."""
    names = set(_names(mis.folder(directory)))
    return all({shard.name, mis.report_path(directory, shard).name} <= names for shard in build.shards)


class ShardWriter:
    """Write one shard and what describes it."""

    def __init__(self, directory: str | Path, shard: Shard, made_on: str):
        """Raise UserError, as all methods do, where the disk is full or cannot be written."""
        self._directory, self._shard, self._made_on = directory, shard, made_on
        self._path = mis.folder(directory) / shard.name
        self._num_images: list[int] = []
        self._dropped_images: collections.Counter[str] = collections.Counter()
        self._dropped_sets: collections.Counter[str] = collections.Counter()
        self._writer = RecordWriter(self._path)

    def add(self, serialized: bytes, num_images: int) -> None:
        self._writer.write(serialized)
        self._num_images.append(num_images)

    def count_dropped(self, images: Mapping[str, int], set_by: str | None = None) -> None:
        """Count what was dropped. images: of one set, by rule. set_by: the rule that dropped the set."""
        self._dropped_images.update(images)
        if set_by is not None:
            self._dropped_sets[set_by] += 1

    def finish(self) -> None:
        """Finish the shard: its records are on disk before their name is, and that before what describes them."""
        self._writer.finish()
        with disk.errors(self._path):
            report = ShardReport(
                name=self._shard.name,
                sha256=disk.sha256(self._path),
                num_bytes=self._path.stat().st_size,
                captions=len(self._shard.captions),
                num_images=self._num_images,
                dropped_images=_total([self._dropped_images]),
                dropped_sets=_total([self._dropped_sets]),
                made_on=self._made_on,
            )
            _write_json(mis.report_path(self._directory, self._shard), report)

    def abandon(self) -> None:
        """Leave nothing."""
        self._writer.abandon()


def _write_tfds(path: Path, splits: Mapping[str, list[ShardReport]]) -> None:
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=mis.KIND, version=tfds.core.Version(mis.TFDS_VERSION), data_dir=str(path), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity, description=mis.__doc__, features=records.features(), disable_shuffling=True
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(data_dir=path, dataset_name=mis.KIND, filetype_suffix="array_record")
    info.set_splits(
        tfds.core.splits.SplitDict(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(report.num_images) for report in reports],
                num_bytes=sum(report.num_bytes for report in reports),
                filename_template=template,
            )
            for split, reports in splits.items()
            if any(report.num_images for report in reports)  # TFDS opens no split without examples
        )
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        info.write_to_directory(elsewhere)
        for file in sorted(Path(elsewhere).iterdir()):
            disk.write(path / file.name, file.read_bytes())


def _write_json(path: Path, values: Any) -> None:
    disk.write(path, f"{json.dumps(dataclasses.asdict(values))}\n".encode())


def _names(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.exists() else []


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))
