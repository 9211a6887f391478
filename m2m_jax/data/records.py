"""The record format of image sets: the one format that every data source of this project yields or stores.

A record is one image set, the unit that Image-Set Attention works on. On disk it is a TFDS example
(`features()`, file format array_record, no TensorFlow) with these fields:

| field          | type              | meaning                                                          |
|----------------|-------------------|------------------------------------------------------------------|
| set_id         | text              | unique within the data set, stable over rebuilds                 |
| kind           | text              | what the images share, e.g. "style", "content", "folder", "mis"  |
| caption        | text              | describes the whole set; may be empty                            |
| images         | sequence of bytes | up to 25 encoded images: PNG, JPEG or WebP; RGBA for cut-outs    |
| image_captions | sequence of text  | empty, or one caption an image, in the same order                |
| latents        | bytes             | empty, or the C-order little-endian values of [n, h, w, c]       |
| latents_dtype  | text              | "", "float16" or "float32"                                       |
| latents_shape  | int64 [4]         | n, h, w, c; zeros without latents                                |

and, in data sets whose images have attributes (cameras, steps, poses), two more:

| attribute_names | sequence of text  | what they are called, sorted: letters, digits and underscores   |
| attributes      | sequence of bytes | of each the C-order little-endian float32 values of [n, c]      |

A record holds `images` or `latents` or both (then for the same n images in the same order). Latents are
already multiplied by the first stage's scaling factor. In Python a record is an `ImageSetRecord`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from m2m_jax.configuration import MAX_IMAGES_PER_SET
from m2m_jax.core.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

MAX_IMAGES_PER_RECORD = MAX_IMAGES_PER_SET
STORES = ("images", "latents", "both")  # what the records of a data set may hold
LATENT_DTYPES = ("float16", "float32")
FORMATS = ("records", "folders")  # of image sets on disk


class BadRecord(UserError):
    """A record or an image that is damaged, and will be tomorrow: `data.on_error=skip` may pass over it.

    What may be mended by itself, an unreachable disk for one, is a UserError and none of these.
    """


@dataclasses.dataclass(frozen=True)
class ImageSetRecord:
    """One image set in memory; fields as in the table above.

    images: encoded bytes, one object an image (empty when the record holds only latents).
    latents: float16 or float32 [n, h, w, c], or None.
    attributes: {name: float32 [n, c]}, what is known of each image besides.
    origin: where it was read, for messages; files: its images' paths, where each is a file of its own. Not stored.
    """

    set_id: str
    kind: str
    caption: str
    images: Sequence[bytes]
    image_captions: tuple[str, ...] = ()
    latents: np.ndarray | None = None
    attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    origin: str = ""
    files: tuple[str, ...] = ()

    @property
    def num_images(self) -> int:
        """Number of images, encoded or as latents."""
        return len(self.images) if self.images else (0 if self.latents is None else len(self.latents))

    def image_name(self, index: int) -> str:
        """Return what messages call one of its images."""
        return self.files[index] if self.files else f"{self.origin}, set {self.set_id!r}, image {index}"


def features(*, attributes: bool = False) -> tfds.features.FeaturesDict:
    """Return the TFDS features of records, with or without attributes.

    Images are opaque bytes: TFDS's own Image feature needs TensorFlow.
    """
    import tensorflow_datasets as tfds  # not above: who reads this module's names need not wait for it

    of_attributes = {name: tfds.features.Sequence(tfds.features.Text()) for name in ("attribute_names", "attributes")}
    return tfds.features.FeaturesDict(
        {
            **(of_attributes if attributes else {}),
            "set_id": tfds.features.Text(),
            "kind": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Text()),
            "image_captions": tfds.features.Sequence(tfds.features.Text()),
            "latents": tfds.features.Text(),
            "latents_dtype": tfds.features.Text(),
            "latents_shape": tfds.features.Tensor(shape=(4,), dtype=np.int64),
        }
    )


def encode_record(record: ImageSetRecord) -> dict:
    """Return a record as the TFDS example of `features()`, with attributes where it has any.

    Raises:
      UserError: the record breaks the format.
    """
    _check(record, f"set {record.set_id!r}")
    latents, shape, dtype = b"", np.zeros(4, np.int64), ""
    if record.latents is not None:
        dtype = record.latents.dtype.name
        latents = np.ascontiguousarray(record.latents, record.latents.dtype.newbyteorder("<")).tobytes()
        shape = np.asarray(record.latents.shape, np.int64)
    names = sorted(record.attributes)
    values = [np.ascontiguousarray(record.attributes[name], "<f4").tobytes() for name in names]
    return {
        **({"attribute_names": names, "attributes": values} if names else {}),
        "set_id": record.set_id,
        "kind": record.kind,
        "caption": record.caption,
        "images": list(record.images),
        "image_captions": list(record.image_captions),
        "latents": latents,
        "latents_dtype": dtype,
        "latents_shape": shape,
    }


def decode_record(example: dict, *, origin: str) -> ImageSetRecord:
    """Return a TFDS example as an ImageSetRecord.

    origin: where the example was read, for messages. Raises BadRecord naming origin and set.
    """
    try:
        set_id = _bytes(example["set_id"]).decode()
        where = f"{origin}, set {set_id!r}"
        record = ImageSetRecord(
            set_id=set_id,
            kind=_bytes(example["kind"]).decode(),
            caption=_bytes(example["caption"]).decode(),
            images=tuple(map(_bytes, example["images"])),
            image_captions=tuple(_bytes(text).decode() for text in example["image_captions"]),
            latents=_decode_latents(example, where),
            attributes=_decode_attributes(example, where),
            origin=origin,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise BadRecord(f"{origin}: not an image-set record ({error!r})") from error
    _check(record, where)
    if record.latents is not None and not np.isfinite(record.latents).all():
        bad = np.flatnonzero(~np.isfinite(record.latents).all((1, 2, 3)))
        raise BadRecord(f"{where}: the latents of image {', '.join(map(str, bad))} are not finite")
    return record


def _bytes(value: object) -> bytes:
    """bytes(5) would be five zeros, and bytes(10**12) all of the memory."""
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} in the place of bytes")
    return value


def _decode_latents(example: dict, where: str) -> np.ndarray | None:
    dtype = _bytes(example["latents_dtype"]).decode()
    if not dtype:
        return None
    if dtype not in LATENT_DTYPES:
        raise BadRecord(f"{where}: latents of type {dtype!r}; expected one of {LATENT_DTYPES}")
    shape = tuple(int(extent) for extent in example["latents_shape"])
    values, data = np.dtype(dtype).newbyteorder("<"), _bytes(example["latents"])
    if len(shape) != 4 or min(shape) < 1 or len(data) != math.prod(shape) * values.itemsize:
        raise BadRecord(f"{where}: {len(data)} bytes of latents do not fill the shape {shape} of {dtype}")
    return np.frombuffer(data, values).reshape(shape).astype(dtype)


def _decode_attributes(example: dict, where: str) -> dict[str, np.ndarray]:
    names = [_bytes(name).decode() for name in example.get("attribute_names", ())]
    values = [_bytes(value) for value in example.get("attributes", ())]
    shape = [int(extent) for extent in example["latents_shape"]]
    images = len(example["images"]) or shape[0]
    if len(names) != len(values) or any(images < 1 or len(value) % (4 * images) for value in values):
        raise BadRecord(f"{where}: the attributes {', '.join(names)} do not have float32 values for {images} images")
    return {
        name: np.frombuffer(value, "<f4").reshape(images, -1).astype(np.float32)
        for name, value in zip(names, values, strict=True)
    }


def check_attributes(record: ImageSetRecord, where: str) -> None:
    """Raise BadRecord unless every attribute is finite float32 [n, c] under a name. where: opens the message."""
    for name, values in record.attributes.items():
        if not re.fullmatch("[A-Za-z0-9_]{1,64}", name):
            raise BadRecord(f"{where}: an attribute is called {name!r:.80}; letters, digits and _ make a name")
        wanted = values.dtype == np.float32 and values.ndim == 2 and values.shape[1] > 0
        if not wanted or len(values) != record.num_images:
            raise BadRecord(
                f"{where}: attribute {name!r} must be float32 [{record.num_images}, c], "
                f"not {values.dtype.name} {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            raise BadRecord(f"{where}: attribute {name!r} is not finite")


def _check(record: ImageSetRecord, where: str) -> None:
    """Refuse records that no reader could use. `where` opens the message."""
    if record.num_images == 0:
        raise BadRecord(f"{where}: empty, neither images nor latents")
    if record.num_images > MAX_IMAGES_PER_RECORD:
        raise BadRecord(f"{where}: {record.num_images} images; a record holds up to {MAX_IMAGES_PER_RECORD}")
    if record.latents is not None:
        if record.latents.ndim != 4 or record.latents.dtype.name not in LATENT_DTYPES:
            raise BadRecord(
                f"{where}: latents must be float16 or float32 [n, h, w, c], "
                f"not {record.latents.dtype.name} {list(record.latents.shape)}"
            )
        if len(record.latents) != record.num_images:
            raise BadRecord(f"{where}: {len(record.latents)} latents for {record.num_images} images")
    check_attributes(record, where)
    if record.image_captions and len(record.image_captions) != record.num_images:
        captions = len(record.image_captions)
        raise BadRecord(f"{where}: {captions} image captions for {record.num_images} images")
