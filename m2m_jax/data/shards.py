"""Records by their number, from array_record files: what all data sets of such files read.

The files carry checksums, which their reader compares: a damaged record is an error, never another record.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import resource
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import EllipsisType

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from m2m_jax.core.errors import UserError, one_line
from m2m_jax.data import records
from m2m_jax.data.records import BadRecord
from m2m_jax.data.source import RecordSource

_NAMED = 3  # files in a message
_OPENED_AT_ONCE = 16
_OTHER_FILES = 1024  # that a process may have open
# One record at a time is read. By default opening a file reads its last MiB: of 23,000 files, in every process.
_READER = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"


class ShardRecords(RecordSource):
    """The records of one split, in array_record files.

    Attributes:
      faults: {shard: what is wrong with the whole file}; records in it raise BadRecord.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        counts: Sequence[int],
        kinds: Sequence[str],
        num_images: Sequence[int],
        *,
        remedy: str,
        strict: bool,
        split: str = "",
        version: str = "",
        attributes: Mapping[str, int] | None = None,
        latent_shape: tuple[int, ...] | EllipsisType | None = ...,
    ):
        """
        Args:
          counts: records in each file.
          remedy: ends messages.
          strict: UserError where a file is missing, is cut off or holds another number of records; otherwise that is
            found out record by record.
          split: the name of the split.
          version: of the content, for the fingerprint.
          attributes: see `RecordSource`.
          latent_shape: of each image's latents, which records must hold; None: they must hold none; ...: any.
        """
        if not sum(counts) == len(kinds) == len(num_images):
            raise UserError(
                f"{name}: its files should hold {sum(counts)} records, and {len(kinds)} kinds and "
                f"{len(num_images)} numbers of images are listed; {remedy}"
            )
        self.name, self.split, self.kinds, self.num_images = name, split, kinds, num_images
        self._paths, self._remedy = list(paths), remedy
        self.attributes, self._latent_shape = dict(attributes or {}), latent_shape
        self._features = records.features(attributes=bool(self.attributes))
        listing = hashlib.sha256(json.dumps([version, list(counts), self.attributes]).encode())
        listing.update("\n".join(kinds).encode())
        listing.update(np.asarray(num_images, "<i4").tobytes())
        self.fingerprint = listing.hexdigest()
        self._ends = list(itertools.accumulate(counts))
        self._readers: dict[int, ArrayRecordReader] = {}
        self._most_open = _allow_open_files(len(self._paths))
        self._lock = threading.Lock()
        with concurrent.futures.ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            found = list(pool.map(_fault, self._paths, counts))
        self.faults = {shard: fault for shard, fault in enumerate(found) if fault}
        if self.faults and strict:
            shown = "; ".join(list(self.faults.values())[:_NAMED])
            more = f" and {len(self.faults) - _NAMED} more" if len(self.faults) > _NAMED else ""
            raise UserError(f"{name}: {shown}{more} ({len(self.faults)} of {len(self._paths)} files); {remedy}")

    def __getstate__(self) -> dict:
        """For worker processes, which open files of their own."""
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __getitem__(self, index: int) -> records.ImageSetRecord:
        """Raise BadRecord, which names the file, the record in it and, where it can be read, the set."""
        shard = bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        if shard in self.faults:
            raise BadRecord(f"{self.faults[shard]}; {self._remedy}")
        origin = f"{self._paths[shard]}, record {place}"
        try:
            serialized = self._reader(shard).read([place])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            with self._lock:  # a reader that failed may not read on
                self._readers.pop(shard, None)
            raise BadRecord(f"{origin}: damaged ({one_line(error)}); {self._remedy}") from error
        try:
            example = self._features.deserialize_example_np(serialized)
        except Exception as error:  # of protobuf, TFDS or NumPy, whichever comes first
            raise BadRecord(f"{origin}: not an image-set record ({one_line(error)}); {self._remedy}") from error
        record = records.decode_record(example, origin=origin)
        if record.num_images != self.num_images[index]:
            raise BadRecord(
                f"{origin}, set {record.set_id!r}: holds {record.num_images} images, and {self.num_images[index]} are "
                f"listed; {self._remedy}"
            )
        if self.has_images and not record.images:
            raise BadRecord(f"{origin}, set {record.set_id!r}: holds no images; {self._remedy}")
        if self._latent_shape is not ...:
            expected = self._latent_shape and (self.num_images[index], *self._latent_shape)
            found = None if record.latents is None else record.latents.shape
            if found != expected:
                raise BadRecord(f"{origin}, set {record.set_id!r}: its latents are {found}, not {expected}")
        return record

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard in self._readers:
                return self._readers[shard]
        reader = ArrayRecordReader(str(self._paths[shard]), _READER)  # not under the lock: it may be slow
        with self._lock:
            if len(self._readers) >= self._most_open:
                self._readers.pop(next(iter(self._readers)))  # closed when no thread reads from it
            return self._readers.setdefault(shard, reader)


def count_records(path: Path) -> int:
    """Count the records of a shard; 0 for what is missing, cut off or no array_record file."""
    if not path.is_file():
        return 0
    with contextlib.suppress(RuntimeError):
        reader = ArrayRecordReader(str(path), _READER)
        count = reader.num_records()
        reader.close()  # raises where the file is cut off
        return count
    return 0


def _allow_open_files(more: int) -> int:
    """Have the system let this process open so many more files. Returns how many of them it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if more <= _OTHER_FILES // 2 or soft == resource.RLIM_INFINITY:
        return more
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        wanted = soft
    return max(min(more, wanted - _OTHER_FILES), 1)


def _fault(path: Path, count: int) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    found = count_records(path)
    if found == count:
        return None
    return f"{path} holds {found} records, not {count}" if found else f"{path} is cut off or damaged"
