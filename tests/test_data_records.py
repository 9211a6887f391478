"""The record format: what goes in comes out, through TFDS and array_record, and broken records are named."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.data import records


def _png(size=(8, 6), mode="RGBA", colour=(200, 10, 30, 128)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def _record(**changes) -> records.ImageSetRecord:
    fields = {
        "set_id": "set-ü",
        "kind": "content",
        "caption": "a grinning face",
        "images": (_png(), _png((3, 5))),
        "image_captions": ("one", "zwei ☺"),
        "latents": np.arange(2 * 4 * 4 * 3, dtype=np.float16).reshape(2, 4, 4, 3),
    }
    return records.ImageSetRecord(**(fields | changes))


RECORDS = [
    _record(),
    _record(set_id="no latents", latents=None),
    _record(set_id="no captions", image_captions=(), latents=None),
    _record(set_id="only latents", images=(), latents=np.ones((2, 1, 2, 3), np.float32)),
    _record(set_id="25 images", images=(_png(),) * 25, image_captions=(), latents=None),
    _record(set_id="empty caption", caption=""),
]


class SomeRecords(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=records.features(), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, record in enumerate(RECORDS):
            yield index, records.encode_record(record)


def test_record_round_trip(tmp_path):
    builder = SomeRecords(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source("train")
    assert len(source) == len(RECORDS)
    for index, expected in enumerate(RECORDS):
        record = records.decode_record(source[index], origin="test")
        assert (record.set_id, record.kind, record.caption) == (expected.set_id, expected.kind, expected.caption)
        assert record.images == expected.images
        assert record.image_captions == expected.image_captions
        assert record.num_images == expected.num_images
        if expected.latents is None:
            assert record.latents is None
        else:
            assert record.latents.dtype == expected.latents.dtype
            np.testing.assert_array_equal(record.latents, expected.latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": (), "latents": None}, "neither images nor latents"),
        ({"images": (_png(),) * 26, "latents": None, "image_captions": ()}, "26 images"),
        ({"image_captions": ("one",)}, "1 image captions for 2 images"),
        ({"latents": np.zeros((3, 1, 1, 1), np.float32)}, "3 latents for 2 images"),
        ({"latents": np.zeros((2, 4), np.float32)}, r"\[n, h, w, c\]"),
        ({"latents": np.zeros((2, 1, 1, 1), np.int32)}, "int32"),
    ],
)
def test_bad_records_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        records.encode_record(_record(**changes))
    assert "set-ü" in str(error.value)


def test_decoding_names_source_record_and_set():
    example = records.encode_record(_record())
    example = {name: value.encode() if isinstance(value, str) else value for name, value in example.items()}
    example["image_captions"] = [caption.encode() for caption in example["image_captions"]]
    example["latents_shape"] = np.array([2, 4, 4, 4])
    with pytest.raises(UserError, match=r"shard-7, record 11, set 'set-ü'.*do not fill"):
        records.decode_record(example, origin="shard-7, record 11")
    del example["images"]
    with pytest.raises(UserError, match="shard-7, record 11: not an image-set record"):
        records.decode_record(example, origin="shard-7, record 11")


def test_no_tensorflow():
    program = (
        "import sys; import m2m_jax.data.pipeline, m2m_jax.data.emoji.builder; "
        "sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
