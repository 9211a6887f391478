"""Damaged data in every source: named by file, record and set; or passed over, always in the same way."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data_fixtures import build_emoji, data_config, write_image_folder
from run_fixtures import run, train_tiny

from m2m_jax.core.errors import UserError
from m2m_jax.data import pipeline, precomputed, records, shards
from m2m_jax.data.records import BadRecord, ImageSetRecord

SETS, IMAGES = 12, 5


@pytest.fixture(scope="module")
def emoji_directory(tmp_path_factory):
    return build_emoji(tmp_path_factory)


@pytest.fixture
def emoji_copy(emoji_directory, tmp_path):
    return pathlib.Path(shutil.copytree(emoji_directory, tmp_path / "data"))


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images", num_sets=SETS, images_per_set=IMAGES)


def _record(index: int, **changes) -> ImageSetRecord:
    latents = np.full((IMAGES, 4, 4, 4), index, np.float32)
    return ImageSetRecord(
        **({"set_id": f"s{index}", "kind": "folder", "caption": "", "images": (), "latents": latents}) | changes
    )


@pytest.fixture
def latents(tmp_path):
    """Three shards of four sets; the latents of set i are i."""
    folder = tmp_path / "latents"
    manifest = precomputed.Manifest(
        version=precomputed.VERSION,
        image_size=32,
        autoencoder={},
        latent_shape=[4, 4, 4],
        latent_dtype="float32",
        has_images=False,
        records_per_shard=4,
        kinds=["folder"] * SETS,
        num_images=[IMAGES] * SETS,
        made_from="nothing",
        command="COMMAND",
    )
    precomputed.write_manifest(folder, "train", manifest)
    for shard in range(3):
        _write_shard(folder, shard, [_record(index) for index in manifest.shard_records(shard)])
    return folder


def _shard(folder, shard):
    return precomputed.shard_path(folder, "train", shard, 3)


def _write_shard(folder, shard, image_sets):
    precomputed.write_shard(_shard(folder, shard), image_sets)


def _config(name, path, **changes):
    config = data_config(name=name, path=str(path), images_per_set=3, **changes)
    config.augment.enabled = False
    return config


def _examples(config, **options):
    return pipeline.open_examples(config, split="train", seed=1, **options)


def _epoch(config):
    examples = _examples(config)
    return [examples[index] for index in range(examples.epoch_length)]


# Latents


def _missing(folder):
    _shard(folder, 1).unlink()
    return r"train-00001-of-00003\.array_record is missing \(1 of 3 files\); .* with: COMMAND"


def _cut_off(folder):
    _shard(folder, 1).write_bytes(_shard(folder, 1).read_bytes()[:-1000])
    return r"train-00001-of-00003\.array_record is cut off or damaged"


def _empty_file(folder):
    _shard(folder, 2).write_bytes(b"")
    return r"train-00002-of-00003\.array_record is cut off or damaged"


def _too_few(folder):
    _write_shard(folder, 0, [_record(0), _record(1)])
    return r"train-00000-of-00003\.array_record holds 2 records, not 4"


def _exchanged(folder):
    """The total is right, and every record of two files would be another."""
    _write_shard(folder, 0, [_record(index) for index in range(5)])
    _write_shard(folder, 1, [_record(index) for index in range(5, 8)])
    return r"00000-of-00003\.array_record holds 5 records, not 4; .*00001-of-00003\.array_record holds 3 records, not 4"


def _listed_otherwise(folder):
    path = precomputed.manifest_path(folder, "train")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kinds": ["folder"]}))
    return r"precomputed-train\.json is damaged \(.*kinds"


@pytest.mark.parametrize("spoil", [_missing, _cut_off, _empty_file, _too_few, _exchanged, _listed_otherwise])
def test_a_data_set_that_is_not_whole_is_refused_at_the_start(latents, spoil):
    words = spoil(latents)
    with pytest.raises(UserError, match=words) as error:
        _examples(_config("precomputed", latents))
    assert "\n" not in str(error.value)


def _bit(folder):
    data = bytearray(_shard(folder, 1).read_bytes())
    data[150] ^= 1  # of the first records, which are compressed together with a checksum
    _shard(folder, 1).write_bytes(data)
    return r"train-00001-of-00003\.array_record, record \d: damaged"


def _other(**changes):
    def spoil(folder):
        _write_shard(folder, 1, [_record(4), _record(5, **changes), _record(6), _record(7)])

    return spoil


def _not_finite(folder):
    latents = np.zeros((IMAGES, 4, 4, 4), np.float32)
    latents[2, 1, 1, 1], latents[4, 0, 0, 0] = np.nan, np.inf
    _other(latents=latents)(folder)
    return r"train-00001-of-00003\.array_record, record 1, set 's5': the latents of image 2, 4 are not finite"


def _wrong_shape(folder):
    _other(latents=np.zeros((IMAGES, 4, 8, 4), np.float32))(folder)
    return r"record 1, set 's5': its latents are \(5, 4, 8, 4\), not \(5, 4, 4, 4\)"


def _other_number(folder):
    _other(latents=np.zeros((IMAGES - 1, 4, 4, 4), np.float32))(folder)
    return r"record 1, set 's5': holds 4 images, and 5 are listed"


def _raw_shard(folder, serialized):
    writer = ArrayRecordWriter(str(_shard(folder, 1)), "group_size:1")
    for index in range(4):
        writer.write(serialized if index == 1 else precomputed.serialize(_record(4 + index)))
    writer.close()


def _empty_set(folder):
    example = records.encode_record(_record(5)) | {"latents_dtype": "", "latents": b""}
    _raw_shard(folder, records.features().serialize_example(example))
    return r"record 1, set 's5': empty, neither images nor latents"


def _no_record(folder):
    _raw_shard(folder, b"no record")
    return r"train-00001-of-00003\.array_record, record 1: not an image-set record"


@pytest.mark.parametrize("spoil", [_bit, _not_finite, _wrong_shape, _other_number, _empty_set, _no_record])
def test_a_damaged_record_is_named(latents, spoil):
    words = spoil(latents)
    with pytest.raises(BadRecord, match=words) as error:
        _epoch(_config("precomputed", latents))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [_not_finite, _missing, _cut_off, _too_few])
def test_latents_are_skipped(latents, spoil, capsys):
    spoil(latents)
    config = _config("precomputed", latents, on_error="skip")
    epoch = _epoch(config)
    damaged = {_not_finite: {5}, _missing: {4, 5, 6, 7}, _cut_off: {4, 5, 6, 7}, _too_few: {0, 1, 2, 3}}[spoil]
    assert sum(example["substituted"] for example in epoch) == len(damaged)
    for example in epoch:
        assert int(example["record_index"]) not in damaged
        assert (example["latents_nhwc"] == example["record_index"]).all()  # it is what it says
    warnings = capsys.readouterr().err.splitlines()
    assert len(damaged) <= len(warnings) <= 10 and all("gets another set" in line for line in warnings)


def test_too_many_damaged_ones_stop_the_run(latents):
    for shard in range(3):
        _shard(latents, shard).unlink()
    with pytest.raises(
        UserError, match=r"example 0: its set and 10 others .*array_record is missing.*m2m_jax.data.check"
    ):
        _examples(_config("precomputed", latents, on_error="skip"))[0]


def test_a_reader_goes_on_after_a_damaged_record(latents):
    _bit(latents)
    source = precomputed.PrecomputedRecords(str(latents), "train", 32)
    read = []
    for index in [*range(SETS)] * 2:
        try:
            read.append(source[index].set_id)
        except BadRecord:
            read.append(None)
    assert read.count(None) == 2 and read[:SETS] == read[SETS:]


# Emoji


def test_emoji(emoji_copy):
    config = data_config(directory=str(emoji_copy))
    (file,) = emoji_copy.glob("emoji/32px/*/emoji-train.*")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"emoji-train\.array_record-00000-of-00001 is cut off or damaged .*prepare"):
        _examples(config)
    file.unlink()
    with pytest.raises(UserError, match=r"emoji-train\.array_record-00000-of-00001 is missing"):
        _examples(config)
    data = bytearray(whole)
    for place in range(100_000, len(data) - 2**17, 100_000):  # the end says where the records are
        data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadRecord, match=r"emoji-train\.array_record-00000-of-00001, record \d+: damaged"):
        _epoch(config)


@pytest.mark.parametrize("name", ["dataset_info.json", "metadata.json", "features.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kinds": 3, "splits": 4, "name": []}'])
def test_the_files_beside_the_emoji(emoji_copy, name, content):
    (file,) = emoji_copy.glob(f"emoji/32px/*/{name}")
    file.write_text(content)
    try:
        examples = _examples(data_config(directory=str(emoji_copy)))
    except UserError as error:
        assert "prepare" in str(error) and "\n" not in str(error)
    else:  # what is not needed may be damaged
        assert examples[0]["images_nhwc"].shape == (4, 32, 32, 3)


# Folders


def _damage(folder):
    for name in ("set02", "set03", "set04"):  # set01 is held out
        (folder / name / "0.png").write_bytes(b"")
        (folder / name / "1.JPG").write_bytes((folder / name / "1.JPG").read_bytes()[:-60])


def test_folders_are_skipped(folder, capsys):
    whole = _epoch(_config("folder", folder))
    _damage(folder)
    config = _config("folder", folder, on_error="skip")
    epoch = _epoch(config)
    # The others are the examples that they were, and those in the place of damaged ones are no copies of a neighbour.
    for before, after in zip(whole, epoch, strict=True):
        if not after["substituted"]:
            np.testing.assert_array_equal(before["images_nhwc"], after["images_nhwc"])
    assert 0 < sum(example["substituted"] for example in epoch) <= 3
    assert "set02/" in capsys.readouterr().err

    # On one process, on two, and resumed in the middle.
    whole = pipeline.make_dataset(_examples(config), batch_size=8)
    parts = [pipeline.make_dataset(_examples(config), batch_size=8, rows=rows) for rows in (range(4), range(4, 8))]
    resumed = pipeline.batches(pipeline.make_dataset(_examples(config), batch_size=8), 2, prefetch=2)
    count = 0
    for step in range(2, 6):
        expected, from_step, shares = whole[step], next(resumed), [part[step] for part in parts]
        count += expected["substituted_b"].sum()
        for name, value in expected.items():
            np.testing.assert_array_equal(from_step[name], value)
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), value)
    assert count > 0


def test_single_images_are_skipped(folder):
    _damage(folder)
    config = _config("folder", folder, on_error="skip")
    config.images_per_set = 1
    epoch = _epoch(config)
    assert sum(example["substituted"] for example in epoch) == 6


def test_sets_without_enough_images_are_left_out(folder, capsys):
    for file in (folder / "set03").iterdir():
        file.unlink()
    (folder / "set04" / "0.png").unlink()
    config = _config("folder", folder, on_error="skip")
    config.images_per_set = 5
    epoch = _epoch(config)
    assert not any(example["substituted"] for example in epoch)
    assert "2 sets with fewer than 5 images are left out" in capsys.readouterr().err


def test_an_unreachable_disk_is_not_skipped(folder, monkeypatch):
    """What is read tomorrow must not be passed over today."""

    def fail(path):
        raise UserError(f"{path}: cannot be read: Input/output error")

    monkeypatch.setattr("m2m_jax.data.sources.folder.read_bytes", fail)
    with pytest.raises(UserError, match="Input/output error") as error:
        _examples(_config("folder", folder, on_error="skip"))[0]
    assert not isinstance(error.value, BadRecord)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train_tiny(tmp_path_factory)


def test_a_run_counts_them(tiny_run, folder, tmp_path):
    _damage(folder)
    data = ("--config.data.name=folder", f"--config.data.path={folder}", f"--workdir={tmp_path / 'run'}")
    stopped = run("train", *tiny_run.arguments, *data)
    assert stopped.code == 2 and "0.png: the file is empty" in stopped.err
    result = run("train", *tiny_run.arguments, *data, "--config.data.on_error=skip")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counted = sum(line.get("train/substituted_sets", 0) for line in lines)
    assert counted > 0 and "gets another set" in result.err
    # Those of held-out sets, too, of which none is damaged here.
    assert {line.get("eval/substituted_sets") for line in lines if "eval/loss_own_context" in line} == {0}


def test_count_records(latents, tmp_path):
    assert shards.count_records(_shard(latents, 0)) == 4
    assert shards.count_records(tmp_path / "nothing") == 0
