"""Precomputed latents: training reads what it would have encoded, and a run goes on where it ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from data_fixtures import data_config, write_image_folder
from parity_fixtures import random_model
from run_fixtures import ONE_LEVEL, ROOT, config_argument, load_config, run

from m2m_jax.core.errors import UserError
from m2m_jax.core.interruption import PREEMPTED
from m2m_jax.data import precomputed, records
from m2m_jax.data.pipeline import SetExamples, inputs, make_dataset, open_examples
from m2m_jax.data.records import BadRecord
from m2m_jax.models.diffusers_folder import load_autoencoder_config, load_params
from m2m_jax.models.dinov2 import DINOv2, DINOv2Config
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels
from m2m_jax.models.transformers_folder import save_dinov2
from m2m_jax.tasks.set_diffusion import SetDiffusion

TINY = config_argument("emoji:tiny")
VAE = ROOT / "pretrained" / "vae"
RECORDS_PER_SHARD = 3
NUM_SHARDS = 3  # of the 8 sets of the train split


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten sets of five pictures: eight to train on."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "pictures", num_sets=10, images_per_set=5)


def _precompute(pictures, output, *more, split="train"):
    return run("data.precompute", *_arguments(pictures, output, split), *more)


def _arguments(pictures, output, split="train"):
    return [
        TINY,
        "--config.data.name=folder",
        f"--config.data.path={pictures}",
        f"--config.autoencoder.path={VAE}",
        f"--split={split}",
        f"--output={output}",
        f"--records_per_shard={RECORDS_PER_SHARD}",
        "--batch_size=8",
    ]


@pytest.fixture(scope="module")
def latents(tmp_path_factory, pictures):
    """Both splits, float32."""
    output = tmp_path_factory.mktemp("latents") / "whole"
    for split in ("train", "validation"):
        result = _precompute(pictures, output, split=split)
        assert result.code == 0, result.err
    return output


@pytest.fixture
def copy(tmp_path, latents):
    return shutil.copytree(latents, tmp_path / "copy")


def _config(name, path, **changes):
    config = data_config(name=name, path=str(path), **changes)
    config.augment.enabled = False
    return config


def _batch(name, path, step=0, split="train", **changes):
    return make_dataset(open_examples(_config(name, path, **changes), split=split, seed=3), batch_size=8)[step]


def _encode(images_bnhwc):
    models = FrozenModels(load_autoencoder_config(VAE))
    return np.asarray(jax.jit(models.encode)({AUTOENCODER: load_params(VAE)}, images_bnhwc))


def _shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


def _shard(folder, number):
    return precomputed.shard_path(folder, "train", number, NUM_SHARDS)


# What is written


@pytest.mark.parametrize("images_per_set", [1, 3, 5])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_batches_are_those_of_encoding_on_the_fly(pictures, latents, images_per_set, split):
    for step in (0, 3):
        pixels = _batch("folder", pictures, step, split, images_per_set=images_per_set)
        batch = _batch("precomputed", latents, step, split, images_per_set=images_per_set)
        assert batch.keys() == {"latents_bnhwc", "example_index_b", "record_index_b", "substituted_b"}
        for name in ("example_index_b", "record_index_b"):
            np.testing.assert_array_equal(batch[name], pixels[name])
        assert batch["latents_bnhwc"].shape == (8, images_per_set, 8, 8, 4)
        assert batch["latents_bnhwc"].dtype == np.float32
        np.testing.assert_allclose(batch["latents_bnhwc"], _encode(pixels["images_bnhwc"]), rtol=0, atol=5e-6)


def test_float16_and_images(tmp_path, pictures, latents):
    result = _precompute(pictures, tmp_path / "half", "--dtype=float16", "--keep_images")
    assert result.code == 0, result.err
    half = precomputed.PrecomputedRecords(str(tmp_path / "half"), "train", 32)
    whole = precomputed.PrecomputedRecords(str(latents), "train", 32)
    for index in range(8):
        assert half[index].latents.dtype == np.float16
        np.testing.assert_array_equal(half[index].latents, whole[index].latents.astype(np.float16))
        assert whole[index].images == ()
        files = sorted((pictures / half[index].set_id).iterdir())
        assert half[index].images == tuple(file.read_bytes() for file in files)
    assert _batch("precomputed", tmp_path / "half")["latents_bnhwc"].dtype == np.float32
    both = make_dataset(
        open_examples(_config("precomputed", tmp_path / "half"), split="train", seed=3, with_images=True), batch_size=8
    )[1]
    pixels = _batch("folder", pictures, 1)
    assert both.keys() == pixels.keys() | {"latents_bnhwc"}
    for name, expected in pixels.items():
        np.testing.assert_array_equal(both[name], expected)


def test_images_that_are_not_there(copy):
    config = _config("precomputed", copy)
    with pytest.raises(UserError, match=r"holds latents alone, and images are wanted: .*precompute --keep_images"):
        open_examples(config, split="train", seed=0, with_images=True)
    manifest = precomputed.manifest_path(copy, "train")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"has_images": True}))
    with pytest.raises(BadRecord, match="holds no images"):
        open_examples(config, split="train", seed=0, with_images=True)[0]


def test_the_emoji_kinds_can_be_chosen(copy):
    manifest = precomputed.manifest_path(copy, "train")
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"kinds": ["style", "content"] * 4}))
    source = precomputed.PrecomputedRecords(str(copy), "train", 32)
    for kinds, expected in [(("style",), {0, 2, 4, 6}), (("style", "content"), set(range(8)))]:
        examples = SetExamples(source, _config("precomputed", copy, kinds=kinds), split="train", seed=0, augment=False)
        assert {examples.choose(index)[0] for index in range(examples.epoch_length)} == expected
    with pytest.raises(UserError, match="nonsense"):
        _batch("precomputed", copy, kinds=("nonsense",))


# Interruption and division


def test_an_interrupted_run_goes_on(tmp_path, pictures, latents):
    output, serialize, calls = tmp_path / "latents", precomputed.serialize, []

    def killed(record):
        calls.append(record)
        if len(calls) > RECORDS_PER_SHARD + 1:
            raise KeyboardInterrupt  # in the middle of the second shard
        return serialize(record)

    with mock.patch.object(precomputed, "serialize", killed), pytest.raises(KeyboardInterrupt):
        _precompute(pictures, output)
    assert list(_shards(output)) == [_shard(output, 0).name]
    # What a process leaves that could not tidy up.
    (output / f".{_shard(output, 1).name}.17.partial").write_bytes(b"half a shard")
    first = _shard(output, 0).stat()

    result = _precompute(pictures, output)
    assert result.code == 0, result.err
    assert "00000-of-00003.array_record: there already" in result.out
    assert result.out.count("images/s") == 2
    assert _shard(output, 0).stat() == first
    train = {name: data for name, data in _shards(latents).items() if name.startswith("train")}
    assert _shards(output) == train
    assert {path.name for path in output.iterdir()} == {*train, "precomputed-train.json"}


def test_processes_share_the_shards(tmp_path, pictures, latents):
    for index in (1, 0):
        arguments = [f"--process_index={index}", "--process_count", "2"]
        result = _precompute(pictures, tmp_path / "latents", *arguments)
        assert result.code == 0, result.err
        assert result.out.count("images/s") == (2, 1)[index]
    assert _shards(tmp_path / "latents").items() <= _shards(latents).items()
    manifest = precomputed.read_manifest(tmp_path / "latents", "train")
    assert "--process" not in manifest.command
    assert f"--output={tmp_path / 'latents'} --records_per_shard=3 --batch_size=8" in manifest.command


def test_processes_that_a_launch_joins_share_the_shards(tmp_path, pictures, latents):
    launch = [ROOT / "launch" / "local.sh", f"--python={sys.executable}", "--module=m2m_jax.data.precompute", "--"]
    command = [*launch, *_arguments(pictures, tmp_path / "joined")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("images/s") == NUM_SHARDS
    ours, theirs = (precomputed.PrecomputedRecords(str(of), "train", 32) for of in (tmp_path / "joined", latents))
    for index in range(8):
        assert ours[index].set_id == theirs[index].set_id
        # Other numbers of devices are other orders of adding up.
        np.testing.assert_allclose(ours[index].latents, theirs[index].latents, rtol=0, atol=5e-6)


def test_told_to_stop_it_ends_after_the_shard_being_made(tmp_path, pictures, latents):
    serialize = precomputed.serialize

    def told(record):
        os.kill(os.getpid(), signal.SIGTERM)
        return serialize(record)

    with mock.patch.object(precomputed, "serialize", told):
        result = _precompute(pictures, tmp_path / "latents")
    assert result.code == PREEMPTED, result.err
    assert "stopped; go on with: python -m m2m_jax.data.precompute" in result.out
    assert list(_shards(tmp_path / "latents")) == [_shard(tmp_path / "latents", 0).name]
    assert _precompute(pictures, tmp_path / "latents").code == 0
    assert _shards(tmp_path / "latents").items() <= _shards(latents).items()


def test_a_damaged_shard_is_made_again(pictures, copy, latents):
    _shard(copy, 1).write_bytes(_shard(copy, 1).read_bytes()[:-1])
    result = _precompute(pictures, copy)
    assert result.out.count("there already") == 2
    assert _shards(copy) == _shards(latents)


# Training

# As little to compile as there can be: one level, and previews of one image.
SMALL = (
    *ONE_LEVEL,
    "--config.data.images_per_set=2",
    "--config.sample.guidance_scale=1.0",
    "--config.train.steps=3",
)


def _train(tmp_path, name, path):
    workdir = tmp_path / name
    result = run(
        "train",
        TINY,
        f"--config.data.name={name}",
        f"--config.data.path={path}",
        "--config.data.augment.enabled=False",
        f"--config.autoencoder.path={VAE}",
        f"--workdir={workdir}",
        *SMALL,
    )
    assert result.code == 0, result.err
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["self", "dino"])
def test_losses_on_latents_are_those_on_their_images(tmp_path, pictures, latents, model):
    config = load_config("emoji:tiny")
    config.autoencoder.path = str(VAE)
    config.model.block_out_channels, config.model.num_attention_heads = (16,), (2,)
    config.model.down_block_types = ("CrossAttnDownBlock2D",)
    if model == "dino":
        encoder = DINOv2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
        save_dinov2(tmp_path / "dino", encoder, random_model(DINOv2, encoder)[1])
        config.image_encoder.update(path=str(tmp_path / "dino"), image_size=28)
        latents = tmp_path / "both"
        assert _precompute(pictures, latents, "--keep_images").code == 0
        assert _precompute(pictures, latents, "--keep_images", split="validation").code == 0
    config.data.update(name="precomputed", path=str(latents))
    task = SetDiffusion(config)
    assert task.needs_images == (model == "dino")
    params, loss = task.init(), jax.jit(lambda p, f, b, step: task.loss(p, f, b, task.draw(b, step)))
    for step in range(3):
        examples = open_examples(_config("precomputed", latents), split="train", seed=3, with_images=task.needs_images)
        batches = (_batch("folder", pictures, step), make_dataset(examples, batch_size=8)[step])
        pixels, encoded = (loss(params, task.frozen, inputs(batch), np.uint32(step))[1] for batch in batches)
        assert pixels.keys() == encoded.keys()
        for name, value in pixels.items():
            np.testing.assert_allclose(encoded[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_training_on_latents_is_training_on_their_images(tmp_path, pictures, latents):
    runs = [_train(tmp_path, "folder", pictures), _train(tmp_path, "precomputed", latents)]
    compared = 0
    for pixels, encoded in zip(*runs, strict=True):
        assert pixels.keys() == encoded.keys()
        for name in pixels:
            if "loss" in name:
                assert encoded[name] == pytest.approx(pixels[name], abs=1e-5), name
                compared += 1
    assert compared >= 5
    assert list((tmp_path / "precomputed" / "samples").glob("*.png"))


# Refusals


def _refused(*arguments):
    result = run(*arguments)
    assert result.code == 2, result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    return result.err


def _train_refused(tmp_path, path, *arguments):
    data = ("--config.data.name=precomputed", f"--config.data.path={path}", "--config.data.augment.enabled=False")
    line = _refused(
        "train", TINY, *data, f"--config.autoencoder.path={VAE}", f"--workdir={tmp_path / 'run'}", *arguments
    )
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--records_per_shard=0"], "--records_per_shard is 0; it must be at least 1"),
        (["--batch_size=0"], "--batch_size is 0; it must be at least 1"),
        (["--batch_size=12"], "multiple of the 8 devices"),
        (["--dtype=int8"], "--dtype"),
        (["--split=tset"], "split 'tset'"),
        (["--autoencoder=none"], "none/config.json is missing"),
        (["--config.data.image_size=30"], "image_size is 30; the autoencoder needs a multiple of 4"),
        (["--process_index=2", "--process_count=2"], "--process_index=2 must be 0 to"),
        (["--process_index=0"], "belong together"),
        (["--config.data.path=none"], "no such folder"),
        (["--config.data.name=precomputed", "--noconfig.data.augment.enabled"], "is latents already"),
    ],
)
def test_what_cannot_be_precomputed(tmp_path, pictures, arguments, words):
    result = _precompute(pictures, tmp_path / "latents", *arguments)
    assert result.code == 2, result
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "latents").exists()


def test_a_set_too_large_for_a_record(tmp_path):
    folder = write_image_folder(tmp_path / "pictures", num_sets=1, images_per_set=26)
    assert "set 'set00': 26 images; a record holds up to 25" in _precompute(folder, tmp_path / "latents").err


def test_a_file_in_the_place_of_the_folder(tmp_path, pictures):
    (tmp_path / "file").write_text("")
    assert "is a file" in _precompute(pictures, tmp_path / "file").err
    assert "cannot be written" in _precompute(pictures, tmp_path / "file" / "latents").err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype=float16"], "latent_dtype differs (float32, now float16); name another --output"),
        (["--keep_images"], "has_images differs"),
        (["--records_per_shard=4"], "records_per_shard differs (3, now 4)"),
        (["--config.data.image_size=16"], "image_size differs"),
    ],
)
def test_other_latents_are_not_mixed_in(pictures, copy, arguments, words):
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    result = _precompute(pictures, copy, *arguments)
    assert result.code == 2
    assert words in result.err
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_another_autoencoder(tmp_path, pictures, copy):
    other = shutil.copytree(VAE, tmp_path / "vae")  # with one other weight
    weights = other / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "autoencoder differs" in _precompute(pictures, copy, f"--autoencoder={other}").err
    line = _train_refused(tmp_path, copy, f"--config.autoencoder.path={other}")
    assert f"config.autoencoder.path={other} is not the autoencoder of the latents" in line


def test_an_incomplete_folder(tmp_path, copy):
    for number in (0, 2):
        _shard(copy, number).unlink()
    line = _train_refused(tmp_path, copy)
    assert f"{_shard(copy, 0)} is missing; {_shard(copy, 2)} is missing (2 of 3 files)" in line
    assert "make it again with: python -m m2m_jax.data.precompute --config" in line


def test_a_damaged_folder(tmp_path, copy):
    shard = _shard(copy, 1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert f"{shard} is cut off or damaged" in _train_refused(tmp_path, copy)
    flipped = bytearray(whole)
    flipped[1000] ^= 255
    shard.write_bytes(flipped)
    source = precomputed.PrecomputedRecords(str(copy), "train", 32)
    with pytest.raises(UserError, match=r"train-00001-of-00003.array_record, record \d: damaged"):
        [source[index] for index in range(8)]
    manifest = precomputed.manifest_path(copy, "train")
    values = json.loads(manifest.read_text())
    for text, words in [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"version": precomputed.VERSION}), "is damaged"),
        (json.dumps(values | {"version": 9}), "is of version 9, not 1"),
    ]:
        manifest.write_text(text)
        with pytest.raises(UserError, match=words):
            precomputed.read_manifest(copy, "train")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.data.augment.enabled=True"], "precomputed latents cannot be augmented"),
        (["--config.data.path="], "config.data.path is empty"),
        (["--config.data.path=none"], "data.path='none' holds no precomputed latents of split 'train'"),
        (
            ["--config.data.train_split=tset"],
            "split 'tset': it has precomputed-train.json, precomputed-validation.json",
        ),
        (["--config.data.image_size=16"], "set --config.data.image_size=32, not 16"),
        (["--config.data.images_per_set=6"], "has 5 images"),
        (["--config.task=autoencoder"], "task=autoencoder needs a data set of images"),
    ],
)
def test_what_cannot_be_trained(tmp_path, latents, arguments, words):
    assert words in _train_refused(tmp_path, latents, *arguments)


def test_export_needs_images(tmp_path, latents):
    data = ("--config.data.name=precomputed", f"--config.data.path={latents}", "--config.data.augment.enabled=False")
    assert "name the data set of images" in _refused("data.export", TINY, *data, f"--output={tmp_path / 'out'}")


def test_latents_that_overflow_float16(tmp_path, pictures):
    folder = shutil.copytree(VAE, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 1e6}))
    result = _precompute(pictures, tmp_path / "latents", f"--autoencoder={folder}", "--dtype=float16")
    assert result.code == 2
    assert "are not finite as float16" in result.err
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["precomputed-train.json"]


def test_records_hold_what_the_format_says(latents):
    source = precomputed.PrecomputedRecords(str(latents), "train", 32)
    assert all(isinstance(source[index], records.ImageSetRecord) for index in range(8))
    assert source[0].kind == "folder"
    assert source.num_images == [5] * 8
