"""What data sets of installed artwork have in common: a TFDS builder, and how a row of pictures becomes sets."""

import importlib.resources
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import on_white
from m2m_jax.data import records
from m2m_jax.data.likeness import without_copies

KINDS = ("style", "content")
MIN_IMAGES, MAX_IMAGES = 4, records.MAX_IMAGES_PER_RECORD
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 1024
_NAMES_IN_CAPTION = 6
T = TypeVar("T")


class SetBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # of TFDS
    """Build image sets from artwork that is installed: a base of TFDS builders. It needs no TensorFlow.

    The docstring of a builder's module is the description of its data set.

    Attributes:
      image_size: side of the square images, pixels.
      licenses: in words.
      license_file: beside this code; it appears with the data.
      packages: folder of the packages that hold the artwork; empty where Python packages do.
      report_progress: called with (number drawn, number to draw) while the artwork is drawn.
    """

    image_size: int
    licenses: ClassVar[str]
    license_file: ClassVar[str]
    packages: str = ""
    code_path = None  # where TFDS looks for checksums of downloads, through a package that it does not itself require
    report_progress: Callable[[int, int], None] | None = None

    @classmethod
    def at(cls, image_size: int, directory: str) -> Self:
        """Return the data set at one image size (pixels), prepared or not, in a directory of prepared data sets.

        Raises:
          UserError: nobody can mean that size.
        """
        if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
            raise UserError(f"image size {image_size}: must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels")
        config = tfds.core.BuilderConfig(name=f"{image_size}px")
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # TFDS warns of every configuration that is not built in
        try:
            made = cls(config=config, data_dir=directory, file_format="array_record")
        finally:
            logging.set_verbosity(verbosity)
        made.image_size = image_size
        return made

    def remark(self) -> str:
        """Return what is to be said to whoever has it made: what it lacks, and the remedy. Empty: nothing."""
        return ""

    def make_sets(self) -> tuple[dict[str, list[records.ImageSetRecord]], dict[str, Any]]:
        """Return the sets of each split, and further metadata."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        # Shuffling is left to the reader: then the order of records is that of the metadata.
        return tfds.core.DatasetInfo(
            builder=self,
            description=sys.modules[type(self).__module__].__doc__,
            features=records.features(),
            license=f"{self.licenses}: see LICENSES.md",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded: the artwork comes with installed packages
        sets, metadata = self.make_sets()
        self.info.metadata.update(metadata)
        sets = {split: made for split, made in sets.items() if made}
        self.info.metadata["kinds"] = {split: [one.kind for one in made] for split, made in sets.items()}
        self.info.metadata["num_images"] = {split: [one.num_images for one in made] for split, made in sets.items()}
        licenses = importlib.resources.files(type(self).__module__.rpartition(".")[0]) / self.license_file
        # self.data_path is TFDS's unfinished directory here: the licences appear together with the data.
        (self.data_path / "LICENSES.md").write_text(licenses.read_text(encoding="utf-8"))
        return {split: self._generate_examples(made) for split, made in sets.items()}

    def _generate_examples(self, sets: list[records.ImageSetRecord]) -> Iterator[tuple[int, dict]]:
        for index, record in enumerate(sets):
            yield index, records.encode_record(record)


def different(row: Sequence[T], pictures: Iterable[np.ndarray]) -> list[T]:
    """List what of a row is no copy of something before. pictures: uint8 RGBA [size, size, 4], of each."""
    return [row[i] for i in without_copies(on_white(np.stack(list(pictures))))] if row else []


def deal(row: Sequence[T]) -> list[Sequence[T]]:
    """Deal a row out evenly to the fewest sets; none if it is too short."""
    if len(row) < MIN_IMAGES:
        return []
    num_parts = -(-len(row) // MAX_IMAGES)
    # Dealing with a stride gives every part some of each style, tone and gender.
    return [row[part::num_parts] for part in range(num_parts)]


def style_caption(group: str, style: str, names: Sequence[str]) -> str:
    """Return the caption of a style row, with the first of its subjects' names."""
    more = ", ..." if len(names) > _NAMES_IN_CAPTION else ""
    return f"{group} in the style of {style}: {', '.join(names[:_NAMES_IN_CAPTION])}{more}"


def make_record(
    set_id: str, kind: str, caption: str, images: Iterable[bytes], image_captions: Iterable[str]
) -> records.ImageSetRecord:
    """Return a set. An image's caption is a list of tags: what it depicts, its group, its style or family."""
    return records.ImageSetRecord(set_id.replace(" ", "-"), kind, caption, tuple(images), tuple(image_captions))


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 RGBA [h, w, 4] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()
