"""Content of records on the host: decoded images, latents, captions and attributes of chosen images.

Whatever else holds a split (a store on the device, for one) has the methods of `HostFetch`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, fit_square
from m2m_jax.data.records import BadRecord, ImageSetRecord, check_attributes
from m2m_jax.data.source import RecordSource

# Decoded and resized images are kept up to this much; the whole emoji data set at 32 px takes 75 MB.
_CACHE_BYTES = 256 * 2**20
_RECORDS_KEPT = 32  # more than there are threads, data.threads


class HostFetch:
    """Read and decode records, and keep what was read last. All methods raise BadRecord for what is damaged.

    Example:
        fetch = HostFetch(source, image_size=32)
        images_nhwc = fetch.images(record=7, images=[3, 0])    # uint8 RGBA [2, 32, 32, 4]
    """

    def __init__(self, source: RecordSource, image_size: int):
        self._source, self._image_size = source, image_size
        self._start_caches()

    def images(self, record: int, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return images of a record, whole and centred in squares: uint8 RGBA [n, S, S, 4] with straight alpha."""
        return np.stack([self.image(record, int(image)) for image in images])

    def latents(self, record: int, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return latents of images of a record: float32 [n, h, w, c]."""
        of_set: Any = self.record(record).latents  # which a source has that is asked for them
        return of_set[images].astype(np.float32)

    def captions(self, record: int, images: Sequence[int] | np.ndarray) -> list[str]:
        """Return the caption of each image or, where there is none, of its set."""
        of_set = self.record(record)
        return [of_set.image_captions[image] if of_set.image_captions else of_set.caption for image in images]

    def attributes(self, record: int, images: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return what the source says that it knows of every image besides: {name: float32 [n, c]}."""
        expected = self._source.attributes
        if not expected:
            return {}
        of_set = self.record(record)
        where = f"{of_set.origin or self._source.name}, set {of_set.set_id!r}"
        check_attributes(of_set, where)
        widths = {name: values.shape[1] for name, values in of_set.attributes.items()}
        if widths != dict(expected):
            raise BadRecord(f"{where}: its attributes are {widths}, not {dict(expected)}")
        return {name: of_set.attributes[name][images] for name in expected}

    def _start_caches(self) -> None:
        # Of one instance: a decorated method would keep every instance alive.
        self.image = functools.lru_cache(maxsize=_CACHE_BYTES // (4 * self._image_size**2))(self._decode)
        # A record is read once for all of its images that an example takes, in whichever thread.
        self.record = functools.lru_cache(maxsize=_RECORDS_KEPT)(self._source.__getitem__)

    def _decode(self, record: int, image: int) -> np.ndarray:
        """Return one image, uint8 RGBA [S, S, 4], read-only because it is shared."""
        of_set: ImageSetRecord = self.record(record)
        data = of_set.images[image]
        try:
            pixels = fit_square(decode_image(data, of_set.image_name(image)), self._image_size)
        except UserError as error:
            raise BadRecord(str(error)) from error
        pixels.flags.writeable = False
        return pixels

    def __getstate__(self) -> dict:
        """For worker processes, which keep what they read themselves."""
        return {"_source": self._source, "_image_size": self._image_size}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_caches()
