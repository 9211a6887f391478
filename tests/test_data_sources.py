"""A data source of one's own, defined here: read by name, in threads and in worker processes, and trained on."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from data_fixtures import data_config, write_latents
from jax.sharding import PartitionSpec as P
from PIL import Image
from run_fixtures import ONE_LEVEL, config_argument, make_autoencoder, run

from m2m_jax.config_fields import field, options
from m2m_jax.core.errors import UserError
from m2m_jax.data import loader, pipeline, precomputed, records, source
from m2m_jax.data.records import BadRecord, ImageSetRecord
from m2m_jax.data.sources.precomputed import PrecomputedSource
from m2m_jax.training import sharding


def _png(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), tuple(map(int, colour))).save(file, "PNG")
    return file.getvalue()


class ColourRecords(pipeline.RecordSource):
    """Set i is four images of nearly one colour; each knows its camera, three numbers, of which the first is i."""

    def __init__(self, split: str, num_sets: int, broken: str = ""):
        self.name, self.kinds, self.num_images = f"colours ({split})", ["colours"] * num_sets, [4] * num_sets
        self.attributes, self.fingerprint, self._broken = {"camera": 3}, f"{num_sets} sets of {split}", broken

    def __getitem__(self, index: int) -> ImageSetRecord:
        colours = np.random.default_rng(index).integers(40, 200, 3) + np.arange(4)[:, None]
        camera = np.stack([np.full(4, index), np.arange(4), np.zeros(4)], 1).astype(np.float32)
        broken = {"missing": {}, "wide": {"camera": camera[:, :2]}, "nan": {"camera": camera * np.float32("nan")}}
        attributes = broken.get(self._broken, {"camera": camera})
        return ImageSetRecord(
            f"colour{index}", "colours", "a colour", images=tuple(map(_png, colours)), attributes=attributes
        )


@dataclasses.dataclass
class ColourOptions:
    """Options of the source."""

    sets: int = field(12, "How many.", low=1)
    broken: str = field("", "What is wrong.")


class Colours(pipeline.DataSource):
    """Sets of nearly one colour."""

    needs_path = False
    Options = ColourOptions

    @classmethod
    def open(cls, config, split):
        own = options(config)
        return ColourRecords(split, own.sets, own.broken)


@pytest.fixture(autouse=True, scope="module")
def registered():
    pipeline.SOURCES.register("colours")(Colours)
    yield
    for table in (pipeline.SOURCES._registered, pipeline.SOURCES._by):
        table.pop("colours", None)


def _config(**changes):
    return data_config(name="colours", images_per_set=3, **changes)


def _examples(config, **changes):
    return pipeline.open_examples(config, split="train", seed=0, **changes)


def test_batches_have_its_attributes_by_name():
    examples = _examples(_config())
    batch = pipeline.make_dataset(examples, batch_size=4)[2]
    assert batch["attribute_camera_bnc"].shape == (4, 3, 3) and batch["attribute_camera_bnc"].dtype == np.float32
    assert pipeline.inputs(batch).keys() == {"images_bnhwc", "attribute_camera_bnc"}
    for row in range(4):
        record, images = examples.choose(8 + row)
        np.testing.assert_array_equal(batch["attribute_camera_bnc"][row, :, 0], record)
        np.testing.assert_array_equal(batch["attribute_camera_bnc"][row, :, 1], images)
    mesh = jax.sharding.AbstractMesh((1,) * len(sharding.AXES), sharding.AXES)
    assert sharding.batch_sharding(mesh, "attribute_camera_bnc").spec == P(sharding.BATCH_AXES, None, None)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("missing", r"set 'colour\d+': its attributes are {}, not {'camera': 3}"),
        ("wide", r"its attributes are {'camera': 2}, not {'camera': 3}"),
        ("nan", "attribute 'camera' is not finite"),
    ],
)
def test_attributes_are_checked(broken, words):
    with pytest.raises(BadRecord, match=words):
        _examples(_config(options={"broken": broken}))[0]


def test_attributes_are_stored_beside_latents(tmp_path):
    folder = write_latents(tmp_path / "latents", num_sets=2)
    manifest = dataclasses.replace(precomputed.read_manifest(folder, "train"), attributes={"camera": 3, "step": 1})
    precomputed.manifest_path(folder, "train").unlink()
    precomputed.write_manifest(folder, "train", manifest)
    camera = np.arange(12, dtype=np.float32).reshape(4, 3)
    latents = np.zeros((4, 4, 4, 4), np.float32)
    sets = [
        ImageSetRecord(
            f"s{i}", "folder", "", (), latents=latents, attributes={"step": camera[:, :1], "camera": camera + i}
        )
        for i in range(2)
    ]
    precomputed.write_shard(precomputed.shard_path(folder, "train", 0, 1), sets)
    config = data_config(name="precomputed", path=str(folder))
    config.augment.enabled = False
    found = PrecomputedSource.open(config, "train")
    for i in range(2):
        np.testing.assert_array_equal(found[i].attributes["camera"], camera + i)
    batch = pipeline.make_dataset(_examples(config), batch_size=2)[0]
    assert batch["attribute_camera_bnc"].shape == (2, 4, 3) and batch["attribute_step_bnc"].shape == (2, 4, 1)
    for name, values in (("a name", camera), ("camera", camera[:3]), ("camera", camera.astype(np.float64))):
        with pytest.raises(UserError, match="attribute"):
            records.encode_record(ImageSetRecord("s", "folder", "", (), latents=latents, attributes={name: values}))


@pytest.mark.parametrize(("name", "batched"), [("images_nhwc", "images_bnhwc"), ("record_index", "record_index_b")])
def test_names_in_batches(name, batched):
    assert loader.batched_name(name) == batched


def test_worker_processes_make_the_same_batches(tmp_path):
    """They get the examples by pickle, so the source is one that they can import."""
    config = data_config(name="precomputed", path=str(write_latents(tmp_path)), images_per_set=3)
    config.augment.enabled = False
    alone = pipeline.make_dataset(_examples(config), batch_size=4, rows=[1, 3])
    shared = pipeline.make_dataset(_examples(config), batch_size=4, rows=[1, 3], threads=2, workers=2)
    stream = pipeline.batches(shared, 5, prefetch=2)
    for step in range(5, 9):
        batch = next(stream)
        assert batch.keys() == alone[step].keys()
        for name, value in alone[step].items():
            np.testing.assert_array_equal(batch[name], value)
    stream.close()


def test_another_folder_is_found_by_its_kind(tmp_path):
    write_latents(tmp_path / "latents", splits=("train", "validation"))
    found = source.find_sources(tmp_path / "latents")
    assert [len(one) for one in found] == [6, 6] and not any(one.has_images for one in found)
    with pytest.raises(UserError, match="no such folder"):
        source.find_sources(tmp_path / "none")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return make_autoencoder(tmp_path_factory.mktemp("vae"))


def _train(autoencoder, workdir, *arguments):
    result = run(
        "train",
        config_argument("emoji:tiny"),
        "--config.data.name=colours",
        f"--config.autoencoder.path={autoencoder}",
        *ONE_LEVEL,
        "--config.train.log_every=1",
        *arguments,
        f"--workdir={workdir}",
    )
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return result, [line["train/loss"] for line in lines if "train/loss" in line]


def test_it_is_trained_on_and_augmented_on_the_host_or_in_the_step(autoencoder, tmp_path):
    on_host = _train(autoencoder, tmp_path / "host", "--config.train.steps=4")[1]
    result, in_step = _train(
        autoencoder, tmp_path / "step", "--config.train.steps=3", "--config.data.augment.on_device=True"
    )
    assert "the data are not those of" not in result.out + result.err
    # The images are the same to the bit; what XLA makes of the rest of the step need not be.
    np.testing.assert_allclose(in_step, on_host[:3], rtol=1e-5)
    # It goes on on the host, and tells that sets came: after them, there are other examples.
    more = ("--config.train.steps=4", "--config.data.options.sets=13")
    result, losses = _train(autoencoder, tmp_path / "step", *more)
    assert len(losses) == 4
    for split in ("train", "validation"):
        assert f"the data of split '{split}': sets or files came or went" in result.out + result.err
