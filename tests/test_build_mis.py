"""Building image sets from captions: what is written, by whom, after which interruptions; what is refused."""

import functools
import json
import os
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from build_fixtures import IMAGES_PER_SET, build, differences, write_captions
from text_fixtures import make_stable_diffusion

from m2m_jax.building import build_folder
from m2m_jax.building.building import SetMaker, Slot
from m2m_jax.building.caption_rules import CaptionRules
from m2m_jax.building.cleaning import SetRules
from m2m_jax.building.image_formats import IMAGE_FORMATS
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, on_white
from m2m_jax.data import mis, records
from m2m_jax.data.shards import ShardRecords
from m2m_jax.data.splits import SPLITS
from m2m_jax.sampling.text_to_image import TextToImage

NUM_CAPTIONS = 22


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    """The generator stays open from one run of the program to the next: opening and tracing take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextToImage, "open", functools.cache(TextToImage.open))
        yield


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return make_stable_diffusion(tmp_path_factory.mktemp("generator") / "pipeline")


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return write_captions(tmp_path_factory.mktemp("captions") / "captions.txt", NUM_CAPTIONS)


@pytest.fixture(scope="module")
def built(tmp_path_factory, captions, generator):
    """By one process on eight devices."""
    output = tmp_path_factory.mktemp("sets") / "whole"
    result = build(captions, generator, output)
    assert result.code == 0, result.err
    assert f"{NUM_CAPTIONS}/{NUM_CAPTIONS} sets generated" in result.out and "left" in result.out
    return output


@pytest.fixture
def copy(tmp_path, built):
    return shutil.copytree(built, tmp_path / "copy")


def open_split(output, split: str) -> ShardRecords:
    reports, numbers = (manifest := mis.read_manifest(output)).splits[split], manifest.num_images(split)
    paths, counts = zip(*((mis.folder(output) / one.name, len(one.num_images)) for one in reports))
    return ShardRecords(split, paths, counts, [mis.KIND] * len(numbers), numbers, remedy="", strict=True)


# What is written


def test_every_caption_is_one_set_in_one_split(built, captions):
    rows = captions.read_text().splitlines()
    manifest, found = mis.read_manifest(built), {}
    assert manifest.sets == NUM_CAPTIONS and manifest.images == NUM_CAPTIONS * IMAGES_PER_SET
    assert manifest.dropped == {"captions": {}, "images": {}, "sets": {}}
    assert set(manifest.splits) == set(SPLITS)
    builder = tfds.builder("mis", data_dir=str(built))
    for split, reports in manifest.splits.items():
        assert builder.info.splits[split].num_examples == sum(len(report.num_images) for report in reports)
        by_tfds = builder.as_data_source(split)
        source = open_split(built, split)
        order = []
        for index in range(len(by_tfds)):
            record = source[index]
            assert records.decode_record(by_tfds[index], origin="").set_id == record.set_id
            assert record.kind == "mis" and record.num_images == len(record.latents) == IMAGES_PER_SET
            row = int(record.set_id.removeprefix("mis-"))
            assert record.caption == rows[row] and mis.split_of(record.caption, 0.2, 0.1) == split
            order.append(row)
            found[row] = record
        assert order == sorted(order)
        assert all(report.captions == len(report.num_images) <= 3 for report in reports)
    assert sorted(found) == list(range(NUM_CAPTIONS))


def test_an_image_is_what_the_generator_makes_of_seed_row_and_number(built, generator):
    alone = TextToImage.open(generator, devices=tuple(jax.devices()[:1]), steps=2, stepper="ddim", guidance_scale=3.0)
    record = open_split(built, "train")[4]
    row = int(record.set_id.removeprefix("mis-"))
    # As many at once as there: other shapes are other orders of adding up.
    latents_bnhwc, images_bnhwc = alone.generate([record.caption] * 2, [row] * 2, [2], seed=0)
    np.testing.assert_array_equal(record.latents[2], np.asarray(latents_bnhwc)[0, 0].astype(np.float16))
    pixels = on_white(np.asarray(decode_image(record.images[2], "")))
    np.testing.assert_array_equal(pixels, np.asarray(images_bnhwc)[0, 0])


def test_the_manifest_says_what_was_built(built, generator):
    manifest = mis.read_manifest(built)
    settings = manifest.settings
    assert settings["captions"]["rules"] == CaptionRules().__dict__
    assert settings["rules"] == SetRules().__dict__
    assert settings["generator"]["settings"]["guidance_scale"] == 3.0
    assert (settings["image_size"], settings["latent_shape"], settings["latents_dtype"]) == (16, [8, 8, 4], "float16")
    for reports in manifest.splits.values():
        for report in reports:
            path = mis.folder(built) / report.name
            assert path.stat().st_size == report.num_bytes
            assert disk.sha256(path) == report.sha256


def test_a_split_is_of_the_caption_and_not_of_its_case_or_place():
    captions = [f"caption {i}" for i in range(4000)]
    splits = [mis.split_of(caption, 0.2, 0.1) for caption in captions]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.03)
    assert splits == [mis.split_of(caption.upper(), 0.2, 0.1) for caption in captions]
    assert {mis.split_of(caption, 0.0, 0.0) for caption in captions} == {"train"}


@pytest.mark.parametrize("store", records.STORES)
@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_what_a_record_holds(store, image_format):
    rng = np.random.default_rng(0)
    latents_nhwc = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    images_nhwc = np.kron(rng.integers(0, 256, (2, 4, 4, 3), np.uint8), np.ones((1, 8, 8, 1), np.uint8))
    maker = SetMaker(store, image_format, 90, "float16", SetRules())
    made = maker(Slot(None, 7, "a caption", False), latents_nhwc, images_nhwc)
    example = records.features().deserialize_example_np(made.serialized)
    record = records.decode_record(example, origin="")
    assert (record.set_id, record.caption, made.num_images) == ("mis-00000007", "a caption", 2)
    assert (len(record.images), record.latents is None) == {"images": (2, True), "latents": (0, False)}.get(
        store, (2, False)
    )
    if store != "images":
        np.testing.assert_array_equal(record.latents, latents_nhwc.astype(np.float16))
    for image, expected in zip(record.images, images_nhwc):
        pixels = on_white(np.asarray(decode_image(image, ""))).astype(int)
        assert np.abs(pixels - expected).max() <= (0 if image_format != "webp" else 255)
        assert np.abs(pixels - expected).mean() <= (0 if image_format != "webp" else 20)


def test_latents_that_are_not_finite_are_no_set():
    maker = SetMaker("images", "png", 90, "float16", SetRules())
    images_nhwc = np.zeros((1, 8, 8, 3), np.uint8)
    for value in (np.nan, 1e5):  # too large for float16
        with pytest.raises(UserError, match=r"row 3 .*'a caption'.* not finite as float16"):
            maker(Slot(None, 3, "a caption", False), np.full((1, 2, 2, 4), value, np.float32), images_nhwc)


# Interruption and division


def test_processes_share_the_shards_and_the_last_one_ends_the_build(tmp_path, captions, generator, built):
    for index, last in ((1, False), (0, True)):
        result = build(captions, generator, tmp_path / "sets", f"--process_index={index}", "--process_count", "2")
        assert result.code == 0, result.err
        assert ("whichever ends last writes the manifest" in result.out) != last
        if not last:
            with pytest.raises(UserError, match="not finished: go on with python") as error:
                mis.read_manifest(tmp_path / "sets")
            assert "--process" not in str(error.value) and str(captions) in str(error.value)
    assert not differences(built, tmp_path / "sets")


def test_what_a_kill_leaves_is_made_again_and_nothing_else(captions, generator, built, copy):
    folder = mis.folder(copy)
    shards = sorted(path for path in folder.iterdir() if path.name[-1].isdigit())
    shards[0].with_name(f"{shards[0].name}.json").unlink()  # killed after the shard was renamed
    shards[1].unlink()
    (folder / f".{shards[1].name}.7-ab.partial").write_bytes(b"half a shard")
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    shards[3].with_name(f"{shards[3].name}.json").write_text("{")
    (folder / f".{shards[4].name}.json.7-ab.partial").write_bytes(b"{")
    for name in ("manifest.json", "features.json"):
        (folder / name).unlink()
    (folder / ".manifest.json.7-ab.partial").write_bytes(b"{")

    def written():
        return [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in shards[4:]]

    before = written()
    result = build(captions, generator, copy)
    assert result.code == 0, result.err
    assert f"{len(shards) - 4} of {len(shards)} shards are there already" in result.out
    assert not differences(built, copy)
    assert written() == before


def test_a_finished_build_is_left_as_it_is(captions, generator, built, copy):
    result = build(captions, generator, copy)
    assert result.code == 0, result.err
    assert "generated" not in result.out and "22 sets, 66 images" in result.out
    assert not differences(built, copy)


signals: list[int] = []


def stop_soon(images_nhwc, caption):
    """A safety filter that keeps all, and has this process told to stop."""
    if signals:
        os.kill(os.getpid(), signals.pop())
    return np.ones(len(images_nhwc), bool)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_told_to_stop_it_leaves_whole_shards_and_goes_on(tmp_path, captions, generator, built, number, code):
    option = f"--safety_filter={__name__}:stop_soon"
    signals.append(number)
    result = build(captions, generator, tmp_path / "sets", option)
    assert result.code == code, result.err
    assert "stopped; go on with: python -m m2m_jax.data.build_mis" in result.out
    left = [path.name for path in mis.folder(tmp_path / "sets").iterdir()]
    assert not [name for name in left if name.endswith(".partial")] and "manifest.json" not in left
    result = build(captions, generator, tmp_path / "sets", option)
    assert result.code == 0, result.err
    named = set(differences(built, tmp_path / "sets"))
    # The filter is a setting; the sets are the same.
    assert named == {f"mis/1.0.0/{name}" for name in (mis.BUILD, mis.MANIFEST)}


# Cleaning


def keep_first_two(images_nhwc, caption):
    """A safety filter."""
    assert images_nhwc.dtype == np.uint8 and caption.startswith("red")
    return np.arange(len(images_nhwc)) < 2


def test_what_the_filter_refuses_is_counted(tmp_path, captions, generator):
    result = build(captions, generator, tmp_path / "sets", f"--safety_filter={__name__}:keep_first_two")
    assert result.code == 0, result.err
    manifest = mis.read_manifest(tmp_path / "sets")
    assert manifest.images == 2 * NUM_CAPTIONS
    assert manifest.dropped == {"captions": {}, "images": {"safety_filter": NUM_CAPTIONS}, "sets": {}}
    assert manifest.num_images("test") == [2] * len(manifest.num_images("test"))
    record = open_split(tmp_path / "sets", "test")[0]
    assert len(record.images) == len(record.latents) == 2


def test_captions_and_sets_that_rules_drop_are_counted_even_if_none_is_left(tmp_path, captions, generator):
    with captions.open() as file:
        lines = file.read().splitlines()
    (tmp_path / "captions.txt").write_text("\n".join([*lines[:4], lines[0].upper(), "", "x" * 50, lines[5]]))
    result = build(
        tmp_path / "captions.txt",
        generator,
        tmp_path / "sets",
        *(
            "--max_characters=40",
            "--near_duplicate_bits=64",
            "--min_images=2",
            "--validation_share=0",
            "--test_share=0",
        ),
    )
    # Of 64 bits almost none are further apart than all of them: one image is left.
    assert result.code == 2 and "have dropped all sets" in result.err
    assert "'captions': {'drop_duplicates': 1, 'empty': 1, 'max_characters': 1}" in result.err
    assert "'images': {'near_duplicate_bits': 10}, 'sets': {'min_images': 5}" in result.err
    assert not (mis.folder(tmp_path / "sets") / mis.MANIFEST).exists()


some = []


def keep_some(images_nhwc, caption):
    """A safety filter."""
    return np.full(len(images_nhwc), caption in some)


def test_shards_and_splits_without_a_set_can_be_read(tmp_path, captions, generator, built):
    some[:] = [open_split(built, "train")[index].caption for index in (0, 6, 7)]  # of shards 0 and 2
    result = build(captions, generator, tmp_path / "sets", f"--safety_filter={__name__}:keep_some")
    assert result.code == 0, result.err
    manifest = mis.read_manifest(tmp_path / "sets")
    assert manifest.sets == 3 and manifest.dropped["sets"] == {"min_images": NUM_CAPTIONS - 3}
    assert [len(report.num_images) for report in manifest.splits["train"]][:4] == [1, 0, 2, 0]
    source, by_tfds = open_split(tmp_path / "sets", "train"), tfds.builder("mis", data_dir=str(tmp_path / "sets"))
    assert [source[index].caption for index in range(3)] == some
    assert [one["caption"].decode() for one in by_tfds.as_data_source("train")] == some
    assert set(by_tfds.info.splits) == {"train"}


# Refusals


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--seed=1", "seed was 0, and now is 1"),
        ("--sets_per_shard=4", "sets_per_shard was 3, and now is 4"),
        ("--guidance_scale=2", "generator.settings.guidance_scale was 3.0, and now is 2.0"),
        ("--store=images", "of another build: "),
        ("--min_images=2", "rules.min_images was 1, and now is 2"),
    ],
)
def test_a_folder_with_another_build_is_refused(option, words, captions, generator, built):
    result = build(captions, generator, built, option)
    assert result.code == 2
    assert words in result.err and "name another --output" in result.err


def test_other_captions_and_other_weights_are_another_build(tmp_path, captions, generator, built):
    other = shutil.copytree(generator, tmp_path / "pipeline")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    result = build(captions, other, built)
    assert result.code == 2 and "autoencoder.sha256 was" in result.err
    more = write_captions(tmp_path / "captions.txt", NUM_CAPTIONS + 1)
    result = build(more, generator, built)
    assert result.code == 2 and "is of another build: captions." in result.err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--images_per_set=26", "--images_per_set is 26; it must be between 1 and 25"),
        ("--images_at_once=2", "--images_at_once=2 must divide --images_per_set=3"),
        ("--min_images=4", "--min_images=4 is more than --images_per_set=3"),
        ("--validation_share=0.95", "leave captions to train on"),
        ("--near_duplicate_bits=65", "--near_duplicate_bits is 65; it must be between 0 and 64"),
        ("--safety_filter=numpy", "safety_filter=numpy: not a module:function"),
        ("--process_index=0", "give both or neither"),
        ("--process_index=2 --process_count=2", "must be 0 to"),
        ("--min_words=9", "no caption is left"),
        ("--stepper=magic", "unknown stepper 'magic'"),
        ("--seed=-1", "seed"),
        ("--sets_at_once=0", "sets_at_once"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(option, words, tmp_path, captions, generator):
    result = build(captions, generator, tmp_path / "sets", *option.split())
    assert result.code == 2 and words in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer"])
def test_a_generator_with_a_missing_part_is_refused(part, tmp_path, captions, generator):
    there = shutil.copytree(generator, tmp_path / "pipeline")
    shutil.rmtree(there / part)
    result = build(captions, there, tmp_path / "sets")
    assert result.code == 2 and part in result.err
    assert not (tmp_path / "sets").exists()


def test_folders_that_cannot_be_built_in_are_refused(tmp_path, captions, generator):
    (tmp_path / "file").write_text("")
    result = build(captions, generator, tmp_path / "file")
    assert result.code == 2 and "is a file; name a folder" in result.err
    result = build(captions, generator, tmp_path / "file" / "sets")
    assert result.code == 2 and "cannot be written: Not a directory" in result.err
    mis.folder(tmp_path / "other").mkdir(parents=True)
    (mis.folder(tmp_path / "other") / "thesis.txt").write_text("")
    result = build(captions, generator, tmp_path / "other")
    assert result.code == 2 and "holds thesis.txt, and no build of this program" in result.err
    assert [path.name for path in mis.folder(tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_said_in_a_line_and_leaves_nothing(tmp_path):
    mis.folder(tmp_path).mkdir(parents=True)
    writer = build_folder.ShardWriter(tmp_path, mis.Shard("train", 0, 1, range(9)), "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(UserError, match="00000-of-00001 cannot be written: File too large"):
            for _ in range(9):
                writer.add(os.urandom(2**18), 1)
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.abandon()
    assert list(mis.folder(tmp_path).iterdir()) == []


def test_too_little_memory_is_said_in_a_line(tmp_path, captions, generator, monkeypatch):
    def too_much(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(TextToImage, "generate", too_much)
    result = build(captions, generator, tmp_path / "sets")
    assert result.code == 2 and "--sets_at_once=2 and --images_at_once=1: lower them" in result.err


def test_a_damaged_manifest_is_refused(copy):
    path = mis.folder(copy) / mis.MANIFEST
    values = json.loads(path.read_text())
    values["splits"]["train"][0]["name"] = "../../elsewhere"
    for text in ("{", "[]", "{}", json.dumps(values)):
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            mis.read_manifest(copy)
