"""M2M models as folders that ship beside their frozen models."""

import json
import shutil

import jax
import numpy as np
import pytest
from run_fixtures import run, train_tiny

from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.checkpoints.shipped import FILE
from m2m_jax.core.errors import UserError
from m2m_jax.models.diffusers_folder import load_params, load_unet_config
from m2m_jax.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train_tiny(tmp_path_factory)


@pytest.fixture
def shipped(tmp_path, tiny_run):
    """The run's model and, beside it, a copy of its autoencoder: both can move together."""
    shutil.copytree(tiny_run.autoencoder, tmp_path / "made" / "vae")
    folder = tmp_path / "made" / "m2m"
    result = run("to_diffusers", f"--checkpoint={tiny_run.workdir}", f"--output={folder}", "--dtype=float32")
    assert result.code == 0, result.err
    about = json.loads((folder / FILE).read_text())
    about["config"]["autoencoder"]["path"] = "../vae"
    (folder / FILE).write_text(json.dumps(about))
    return (tmp_path / "made").rename(tmp_path / "moved") / "m2m"


def test_it_is_the_checkpoint(shipped, tiny_run):
    ours, theirs = Sampler.from_checkpoint(shipped), Sampler.from_checkpoint(tiny_run.workdir)
    for name in ("unet_config", "models", "schedule", "settings", "clean_timestep", "image_size", "step"):
        assert getattr(ours, name) == getattr(theirs, name), name
    jax.tree.map(np.testing.assert_array_equal, ours.params, dict(theirs.params))


def test_training_can_start_from_it(shipped, tiny_run):
    assert load_unet_config(shipped).block_out_channels == (16,)
    assert load_params(shipped).keys() == load_for_sampling(tiny_run.workdir).ema_params.keys()


def test_where_its_frozen_models_lie_is_written_relative_to_it(tmp_path, tiny_run):
    folder = tmp_path / "somewhere" / "else"
    assert run("to_diffusers", f"--checkpoint={tiny_run.workdir}", f"--output={folder}").code == 0
    path = json.loads((folder / FILE).read_text())["config"]["autoencoder"]["path"]
    assert path.startswith("..") and (folder / path).resolve() == tiny_run.autoencoder.resolve()


def _edit(folder, change):
    about = json.loads((folder / FILE).read_text())
    change(about)
    (folder / FILE).write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(format=2), "has format 2; this code reads format 1"),
        (lambda about: about.pop("config"), "m2m.json is damaged"),
        (lambda about: about["config"]["autoencoder"].update(path="../nowhere"), "nowhere"),
        (lambda about: about["sha256"].update(autoencoder="00"), "was trained on another autoencoder than that in"),
        (lambda about: about.update(unet=3), "m2m.json is damaged"),
        (lambda about: about["unet"].update(block_out_channels=[48]), "conv_in|down_blocks"),
    ],
)
def test_what_is_wrong_is_named(shipped, change, message):
    _edit(shipped, change)
    with pytest.raises(UserError, match=message):
        Sampler.from_checkpoint(shipped)


def test_another_step_is_not_there(shipped):
    with pytest.raises(UserError, match="no checkpoint of step 4; it has 6"):
        Sampler.from_checkpoint(shipped, step=4)
