"""Image sets made from captions, read again: by TFDS, by the input pipeline, by the checker; and what is refused."""

import json
import resource

import numpy as np
import pytest
import tensorflow_datasets as tfds
from build_fixtures import IMAGES_PER_SET, build, write_captions
from data_fixtures import data_config
from mis_fixtures import IMAGE_SIZE, LATENT_SHAPE, set_name, write_mis
from run_fixtures import ONE_LEVEL, config_argument, make_autoencoder, run
from text_fixtures import make_stable_diffusion

from m2m_jax.building import build_folder
from m2m_jax.core.errors import UserError
from m2m_jax.data import mis, precomputed, records, shards
from m2m_jax.data.pipeline import make_dataset, open_examples
from m2m_jax.data.records import BadRecord
from m2m_jax.data.sources.mis import MisRecords
from m2m_jax.models.diffusers_folder import load_autoencoder_config, load_params

CAPTIONS = {"train": 12, "validation": 5, "test": 3}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Images and latents, said to be of a random autoencoder: (folder, that autoencoder's folder)."""
    root = tmp_path_factory.mktemp("both")
    vae = make_autoencoder(root / "vae")
    autoencoder = precomputed.describe_autoencoder(load_autoencoder_config(vae), load_params(vae))
    return write_mis(root / "mis", captions=CAPTIONS, autoencoder=autoencoder), vae


@pytest.fixture(scope="module")
def stores(both, tmp_path_factory):
    """{store: a folder}."""
    root = tmp_path_factory.mktemp("stores")
    return {store: write_mis(root / store, captions={"train": 12}, store=store) for store in ("images", "latents")} | {
        "both": both[0]
    }


def _config(directory, **changes):
    config = data_config(name="mis", path=str(directory), **changes)
    config.augment.enabled = not config.latents
    return config


def test_tfds_reads_it(both):
    builder = tfds.builder("mis", data_dir=str(both[0]))
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == CAPTIONS
    for split, number in CAPTIONS.items():
        source = builder.as_data_source(split)
        assert len(source) == number
        for index in range(number):
            record = records.decode_record(source[index], origin="TFDS")
            assert (record.set_id, record.caption, record.kind) == (*[set_name(split, index)] * 2, "mis")
            assert len(record.images) == 4 and record.latents.shape == (4, *LATENT_SHAPE)


@pytest.mark.parametrize("split", CAPTIONS)
def test_the_records_of_a_split(both, split):
    source = MisRecords(str(both[0]), split, latents=None, image_size=None)
    assert [source[index].set_id for index in range(CAPTIONS[split])] == [
        set_name(split, i) for i in range(len(source.kinds))
    ]
    assert source.num_images == [4] * CAPTIONS[split]


@pytest.mark.parametrize("images_per_set", [1, 3])
def test_batches_of_images(stores, images_per_set):
    batches = []
    for store in ("images", "both"):
        config = _config(stores[store], images_per_set=images_per_set)
        batches.append(make_dataset(open_examples(config, split="train", seed=3), batch_size=4)[2])
        assert batches[-1]["images_bnhwc"].shape == (4, images_per_set, IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_array_equal(batches[0]["record_index_b"], batches[1]["record_index_b"])


@pytest.mark.parametrize("images_per_set", [1, 3])
def test_batches_of_latents(stores, images_per_set):
    config = _config(stores["both"], images_per_set=images_per_set, latents=True)
    examples = open_examples(config, split="train", seed=3)
    batch = make_dataset(examples, batch_size=4)[2]
    assert batch["latents_bnhwc"].shape == (4, images_per_set, *LATENT_SHAPE)
    assert batch["latents_bnhwc"].dtype == np.float32 and "images_bnhwc" not in batch
    source = MisRecords(str(stores["both"]), "train", latents=True, image_size=IMAGE_SIZE)
    for index, latents_nhwc in zip(batch["example_index_b"], batch["latents_bnhwc"], strict=True):
        record, chosen = examples.choose(int(index))
        np.testing.assert_array_equal(latents_nhwc, source[record].latents[chosen].astype(np.float32))


def test_latents_beside_images(stores):
    options = {"split": "train", "seed": 3, "with_images": True}
    both = make_dataset(open_examples(_config(stores["both"], latents=True), **options), batch_size=4)[2]
    for name, latents in (("images_bnhwc", False), ("latents_bnhwc", True)):
        config = _config(stores["both"], latents=latents)
        config.augment.enabled = False
        alone = make_dataset(open_examples(config, split="train", seed=3), batch_size=4)[2]
        np.testing.assert_array_equal(both[name], alone[name])
    with pytest.raises(UserError, match=r"holds latents alone, and images are wanted: .* --store=both"):
        open_examples(_config(stores["latents"], latents=True), **options)


def test_images_of_another_size_are_resized(stores):
    batch = make_dataset(open_examples(_config(stores["images"], image_size=16), split="train", seed=0), batch_size=2)[
        0
    ]
    assert batch["images_bnhwc"].shape == (2, 4, 16, 16, 3)


def test_a_record_is_read_once_for_its_images(stores, monkeypatch):
    reads, read = [], MisRecords.__getitem__
    monkeypatch.setattr(MisRecords, "__getitem__", lambda self, index: reads.append(index) or read(self, index))
    examples = open_examples(_config(stores["images"]), split="train", seed=0)
    for index in range(12):
        examples[index]
    assert sorted(reads) == list(range(12))


@pytest.mark.parametrize(
    ("store", "changes", "message"),
    [
        ("images", {"latents": True}, "holds images alone: set --config.data.latents=False"),
        ("latents", {}, "holds latents alone: set --config.data.latents=True"),
        ("latents", {"latents": True, "image_size": 16}, "set --config.data.image_size=32, not 16"),
        ("images", {"images_per_set": 5}, "the largest set of .* has 4 images"),
    ],
)
def test_what_it_does_not_hold_is_refused(stores, store, changes, message):
    with pytest.raises(UserError, match=message):
        open_examples(_config(stores[store], **changes), split="train", seed=0)


def test_a_split_that_is_not_there(stores):
    with pytest.raises(UserError, match="no split 'validation'; it has train"):
        open_examples(_config(stores["images"]), split="validation", seed=0)


def test_another_folder_and_an_unfinished_one(tmp_path):
    with pytest.raises(UserError, match=r"build_mis"):
        open_examples(_config(tmp_path), split="train", seed=0)
    build = mis.Build(mis.VERSION, {"sets_per_shard": 2}, {"train": 3}, {}, "python -m COMMAND")
    build_folder.start(tmp_path, build)
    with pytest.raises(UserError, match="is not finished: go on with python -m COMMAND"):
        open_examples(_config(tmp_path), split="train", seed=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("settings", {}),
        ("settings", []),
        ("splits", {"train": 5}),
        ("splits", {"tset": []}),
        ("splits", []),
        ("settings.latent_shape", [8, 8, "4"]),
        ("settings.store", "everything"),
        ("settings.image_size", "32"),
        ("settings.autoencoder", 5),
    ],
)
def test_damaged_manifests_are_refused(tmp_path, field, value):
    directory = write_mis(tmp_path, captions={"train": 2}, images_per_set=1)
    path = mis.folder(directory) / mis.MANIFEST
    manifest = json.loads(path.read_text())
    group, _, name = field.partition(".")
    manifest[group] = manifest[group] | {name: value} if name else value
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        MisRecords(str(directory), "train", latents=None, image_size=None)


@pytest.mark.parametrize("number", [0, 26, "1", 1.0, None])
def test_numbers_of_images_that_no_record_has(tmp_path, number):
    directory = write_mis(tmp_path, captions={"train": 2}, images_per_set=1)
    path = mis.folder(directory) / mis.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"][0]["num_images"][1] = number
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        MisRecords(str(directory), "train", latents=None, image_size=None)


def test_a_shard_that_is_gone_or_another(tmp_path):
    directory = write_mis(tmp_path, captions={"train": 12}, images_per_set=1)
    files = sorted(mis.folder(directory).glob("*-of-00003"))
    files[1].unlink()
    with pytest.raises(UserError, match="00001-of-00003 is missing"):
        MisRecords(str(directory), "train", latents=None, image_size=None)
    source = MisRecords(str(directory), "train", latents=None, image_size=None, strict=False)
    assert source[0].set_id == set_name("train", 0)
    with pytest.raises(BadRecord, match="is missing"):
        source[5]


def test_more_shards_than_a_process_may_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        assert shards._allow_open_files(1500) == 1500
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 2524
        assert shards._allow_open_files(hard) == hard - 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shards_are_closed_to_open_others(tmp_path, monkeypatch):
    directory = write_mis(tmp_path, captions={"train": 6}, images_per_set=1, sets_per_shard=1)
    monkeypatch.setattr(shards, "_allow_open_files", lambda more: 2)
    source = MisRecords(str(directory), "train", latents=None, image_size=None)
    for index in (0, 1, 2, 3, 4, 5, 0, 3, 3, 1):
        assert source[index].set_id == set_name("train", index)
        assert len(source._readers) <= 2


def test_latents_of_another_shape_are_refused(tmp_path):
    directory = write_mis(tmp_path, captions={"train": 2}, images_per_set=1)
    path = mis.folder(directory) / mis.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["settings"]["latent_shape"] = [4, 4, 4]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadRecord, match=r"its latents are \(1, 8, 8, 4\), not \(1, 4, 4, 4\)"):
        MisRecords(str(directory), "train", latents=True, image_size=IMAGE_SIZE)[0]


def _train(both, workdir, *arguments):
    directory, vae = both
    return run(
        "train",
        config_argument("emoji:tiny"),
        "--config.data.name=mis",
        f"--config.data.path={directory}",
        "--config.data.images_per_set=3",
        "--config.data.batch_size=8",
        "--config.eval.batch_size=8",
        f"--config.autoencoder.path={vae}",
        *ONE_LEVEL,
        "--config.train.steps=3",
        *arguments,
        f"--workdir={workdir}",
    )


LATENTS = ("--config.data.latents=True", "--config.data.augment.enabled=False")


def test_training_on_latents(both, tmp_path):
    result = _train(both, tmp_path / "run", *LATENTS)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.slow
def test_what_the_builder_made_is_checked_and_trained_on(tmp_path):
    generator = make_stable_diffusion(tmp_path / "generator")
    captions = write_captions(tmp_path / "captions.txt", 20)
    built = build(captions, generator, tmp_path / "data")
    assert built.code == 0, built.err
    checked = run("data.check", tmp_path / "data", f"--output={tmp_path / 'sheet.png'}")
    assert checked.code == 0 and f"20 sets, {20 * IMAGES_PER_SET} images" in checked.out, checked.out
    size = mis.read_manifest(tmp_path / "data").settings["image_size"]
    source = (tmp_path / "data", generator / "vae")
    result = _train(source, tmp_path / "run", f"--config.data.image_size={size}", *LATENTS)
    assert result.code == 0, result.err


def test_latents_of_another_autoencoder_are_refused(both, tmp_path):
    other = make_autoencoder(tmp_path / "vae")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    result = _train((both[0], other), tmp_path / "run", *LATENTS)
    assert result.code == 2 and "is not the autoencoder of the latents in" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.data.latents=True"], "precomputed latents cannot be augmented"),
        (
            [*LATENTS, "--config.task=autoencoder"],
            "config.data.latents=True reads latents; task=autoencoder needs a data set of images",
        ),
        (["--config.data.latents=True", "--config.data.name=folder"], "data.name=folder has no choice of them"),
        (["--config.data.path="], "data.name=mis needs --config.data.path=DIR"),
    ],
)
def test_configs_that_make_no_run(both, tmp_path, arguments, words):
    result = _train(both, tmp_path / "run", *arguments)
    assert result.code == 2 and words in result.err, result.err


@pytest.mark.parametrize("store", ["images", "latents", "both"])
def test_the_checker_reads_it(stores, store, tmp_path):
    result = run("data.check", stores[store], f"--output={tmp_path / 'sheet.png'}")
    assert result.code == 0, result.out
    assert "mis           12 sets       48 images" in result.out
    assert ("latents [8, 8, 4]: " in result.out) == (store != "images")


def test_the_checker_names_damage(tmp_path):
    directory = write_mis(tmp_path / "mis", captions={"train": 8}, images_per_set=2)
    shard = sorted(mis.folder(directory).glob("*-of-00002"))[0]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    result = run("data.check", directory, f"--output={tmp_path / 'sheet.png'}")
    assert result.code == 1 and f"{shard}, record " in result.out
