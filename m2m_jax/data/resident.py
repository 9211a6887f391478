"""All images of a split at once, for devices that are to hold them: steps pick their own, and wait for no host."""

from __future__ import annotations

import concurrent.futures

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.data.fetch import HostFetch
from m2m_jax.data.records import BadRecord
from m2m_jax.data.source import RecordSource


class ResidentImages:
    """Decode every image of some records of a source, once.

    Attributes:
      rgba_nhwc: uint8 [images, S, S, 4] with straight alpha, record after record.

    Raises:
      UserError: the host's memory does not hold them.

    Example:
        store = ResidentImages(source, image_size=64, records=[0, 1, 2], threads=2)
        rgba_nhwc = jax.device_put(store.rgba_nhwc)[store.places(record=1, images=[3, 0])]
    """

    def __init__(self, source: RecordSource, image_size: int, records: np.ndarray, threads: int):
        fetch = HostFetch(source, image_size)
        counts = np.asarray(source.num_images)[records]
        self._first = dict(zip(records.tolist(), (np.cumsum(counts) - counts).tolist(), strict=True))
        self._damaged: dict[int, BadRecord] = {}
        shape = (int(counts.sum()), image_size, image_size, 4)
        try:
            self.rgba_nhwc = np.zeros(shape, np.uint8)
        except MemoryError as error:
            raise UserError(
                f"config.data.resident: {shape[0]} images of {source.name} take {np.prod(shape) / 2**30:.1f} GiB, more "
                "than this machine has; leave it out"
            ) from error

        def decode(record: int) -> None:
            try:
                for image in range(source.num_images[record]):
                    self.rgba_nhwc[self._first[record] + image] = fetch.image(record, image)
            except BadRecord as error:  # named when it is its turn, as where images are read one by one
                self._damaged[record] = error

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, records.tolist()))

    def places(self, record: int, images: np.ndarray) -> np.ndarray:
        """Return where images of a record are in `rgba_nhwc`: int32 [n]. Raises BadRecord for one that is damaged."""
        if record in self._damaged:
            raise self._damaged[record]
        return (self._first[record] + np.asarray(images)).astype(np.int32)

    def __getstate__(self) -> dict:
        """For worker processes, which need the places alone."""
        return {**self.__dict__, "rgba_nhwc": None}
