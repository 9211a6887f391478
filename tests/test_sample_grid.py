"""Sample grids of a run: made in pieces, the same as at once; and a run that has no memory for one goes on."""

import gc
import weakref
from unittest import mock

import jax
import numpy as np
import pytest
from data_fixtures import write_image_folder
from jax.experimental import multihost_utils
from model_fixtures import random_params
from run_fixtures import ONE_LEVEL, config_argument, load_config, make_autoencoder, run
from text_fixtures import make_bert

from m2m_jax.core.errors import UserError
from m2m_jax.sampling.set_sampler import SetSampler
from m2m_jax.sampling.text_to_image import TextToImage
from m2m_jax.tasks import sample_grid
from m2m_jax.tasks.sample_grid import pieces
from m2m_jax.tasks.set_diffusion import SetDiffusion
from m2m_jax.tasks.text_to_image import TextToImageTask

SIZE = 16
SETS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{config field: folder of a tiny random model}"""
    root = tmp_path_factory.mktemp("models")
    return {"autoencoder.path": make_autoencoder(root / "vae"), "text_encoder.path": make_bert(root / "bert")}


def config_of(file, folders, **changes):
    config = load_config(f"{file}:tiny")
    paths = {name: str(folders[name]) for name in folders if name != "text_encoder.path" or "t2i" in file}
    config.update({"data.image_size": SIZE, **paths, **changes})
    return config


def preview(task, batch, at_once, num_devices=1):
    """The grid, of so many images at once on each of so many devices."""
    devices = jax.local_devices()[:num_devices]
    with (
        mock.patch.object(sample_grid, "PIXELS_AT_ONCE", at_once * SIZE**2),
        mock.patch.object(jax, "local_devices", return_value=devices),
    ):
        return np.asarray(task.sheet(task.samples(random_params(task.shapes), batch, range(SETS), step=1)), int)


def assert_alike_in_pieces(task, batch, generator, method):
    """All sets at once, or one after another, by `method` of the class `generator`, which is first given the sets."""
    whole, original = preview(task, batch, at_once=2 * SETS), getattr(generator, method)
    with mock.patch.object(generator, method, autospec=True, side_effect=original) as made:
        alone = preview(task, batch, at_once=1)
    assert [len(call.args[1]) for call in made.call_args_list] == [1] * SETS
    assert whole.std() > 1 and np.abs(whole - alone).max() <= 1


def images(n):
    return np.random.default_rng(0).integers(0, 256, (SETS, n, SIZE, SIZE, 3), np.uint8)


def latents(n):
    return np.random.default_rng(0).standard_normal((SETS, n, SIZE // 4, SIZE // 4, 4)).astype(np.float32)


def test_as_many_at_once_as_have_the_pixels_of_one_large_image():
    assert pieces(8, 32) == [slice(0, 256)]
    assert pieces(8, 256) == [slice(0, 4), slice(4, 8)]
    assert pieces(3, 512) == pieces(3, 768) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert pieces(3, 512, num_devices=2) == [slice(0, 2), slice(2, 4)]
    assert pieces(0, 32) == []


@pytest.mark.parametrize("batch", [{"images_bnhwc": images(3)}, {"latents_bnhwc": latents(3)}])
def test_sets_in_pieces_are_those_made_at_once(batch, folders):
    task = SetDiffusion(config_of("emoji", folders, **{"data.images_per_set": 3}))
    assert_alike_in_pieces(task, batch, SetSampler, "sample_sets")


@pytest.mark.parametrize("batch", [{"images_bnhwc": images(3)}, {"latents_bnhwc": latents(3)}])
def test_devices_that_share_the_sets_make_those_of_one(batch, folders):
    task = SetDiffusion(config_of("emoji", folders, **{"data.images_per_set": 3}))
    one, two = (preview(task, batch, 1, num_devices) for num_devices in (1, 2))
    assert one.std() > 1 and np.abs(one - two).max() <= 1


def test_processes_make_as_many_sets_each_and_all_in_order(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    of_process = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        of_process.append(sample_grid.rows_of_process(8))
    assert of_process == [[0, 3, 6], [1, 4, 7], [2, 5, 0]]
    pictures = np.array(of_process)[:, :, None, None, None, None] * np.ones((2, 1, 1, 1), int)  # two of each set
    calls = []

    def gathered(x):
        """Of three processes: whether each has pictures, then picture after picture."""
        if x.ndim == 0:
            return np.array([True, True, has_pictures])
        calls.append(x)
        return pictures.reshape(3, -1, 1, 1, 1)[:, len(calls) - 1]

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(sample_grid.gathering, "wait_for_all", lambda: None)
    has_pictures = True
    grid = sample_grid.gather({"generated_bnhwc": pictures[0]}, 8)["generated_bnhwc"]
    assert grid[:, :, 0, 0, 0].tolist() == [[row, row] for row in range(8)] and len(calls) == 6
    has_pictures = False
    assert sample_grid.gather({"generated_bnhwc": pictures[0]}, 8) is None
    assert sample_grid.gather(None, 8) is None


def test_single_images_in_pieces_are_those_made_at_once(folders):
    task = SetDiffusion(config_of("emoji_base", folders))
    batch = {"latents_bnhwc": latents(1)}
    whole, alone = (preview(task, batch, at_once) for at_once in (SETS, 2))
    assert whole.std() > 1 and np.abs(whole - alone).max() <= 1


@pytest.mark.parametrize("batch", [{"images_bnhwc": images(1)}, {"latents_bnhwc": latents(1)}])
def test_images_of_captions_in_pieces_are_those_made_at_once(batch, folders):
    task = TextToImageTask(config_of("emoji_t2i", folders, **{"text_encoder.max_tokens": 9}))
    batch = batch | {"token_ids_bns": task.tokenizer(["red cat", "dog", "blue"])[:, None]}
    assert_alike_in_pieces(task, batch, TextToImage, "generate_from_ids")


def test_an_image_size_that_comes_back_as_another_is_refused(folders):
    """34 pixels are 8 latents a side, which are 32 pixels."""
    with pytest.raises(
        UserError, match="image_size is 34; the autoencoder and a U-Net of 2 levels need a multiple of 8"
    ):
        SetDiffusion(config_of("emoji", folders, **{"data.image_size": 34}))


def test_a_sampler_that_nobody_holds_is_gone_with_its_parameters(folders):
    task = SetDiffusion(config_of("emoji", folders))
    sampler = task.sampler(random_params(task.shapes), step=1)
    assert sampler.programs
    gone = weakref.ref(sampler)
    gc.disable()
    try:
        del sampler
        assert gone() is None
    finally:
        gc.enable()


def failing(words):
    error = jax.errors.JaxRuntimeError(words)
    return mock.patch.object(SetDiffusion, "samples", side_effect=error)


def test_a_run_without_memory_for_a_grid_goes_on(tmp_path, folders):
    pictures = write_image_folder(tmp_path / "pictures", num_sets=6, images_per_set=4)
    arguments = (
        config_argument("emoji:tiny"),
        f"--config.autoencoder.path={folders['autoencoder.path']}",
        *ONE_LEVEL,
        "--config.data.name=folder",
        f"--config.data.path={pictures}",
        "--config.train.steps=1",
        "--config.optimizer.warmup_steps=0",
    )
    with failing("RESOURCE_EXHAUSTED: Out of memory allocating 21474836480 bytes."):
        result = run("train", *arguments, f"--workdir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert "step 1: no memory is left for the sample grid" in result.out and "m2m_jax.sample" in result.out
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir() and not any((tmp_path / "run" / "samples").iterdir())
    with failing("INTERNAL: a fault"), pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        run("train", *arguments, f"--workdir={tmp_path / 'other'}")
