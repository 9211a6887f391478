"""From pixels to a start for M2M: the autoencoder and the single-image U-Net are trained, saved and loaded."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_fixtures import build_emoji
from model_fixtures import drawn_from
from run_fixtures import ROOT, config_argument, load_config, run

from m2m_jax.attention.layout import SetLayout
from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import merge
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.diffusers_folder import load_autoencoder_config, load_params, load_unet_config
from m2m_jax.models.initialization import from_pretrained, is_set_attention
from m2m_jax.models.unet import denoise_sets
from m2m_jax.tasks.registry import TASKS
from m2m_jax.tasks.set_diffusion import SetDiffusion


@pytest.fixture(scope="module")
def emoji_directory(tmp_path_factory):
    return build_emoji(tmp_path_factory)


@pytest.fixture(scope="module")
def vae(tmp_path_factory, emoji_directory):
    """(workdir, saved folder, output of the saving) of configs/emoji_vae.py:tiny."""
    root = tmp_path_factory.mktemp("vae")
    arguments = (config_argument("emoji_vae:tiny"), f"--config.data.directory={emoji_directory}")
    _succeed("train", *arguments, f"--workdir={root / 'run'}")
    return (
        root / "run",
        root / "vae",
        _succeed("to_diffusers", f"--checkpoint={root / 'run'}", f"--output={root / 'vae'}"),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory, emoji_directory, vae):
    """(workdir, saved folder) of configs/emoji_base.py:tiny in the latents of `vae`."""
    root = tmp_path_factory.mktemp("base")
    config = (config_argument("emoji_base:tiny"), f"--config.data.directory={emoji_directory}")
    _succeed("train", *config, f"--config.autoencoder.path={vae[1]}", f"--workdir={root / 'run'}")
    _succeed("to_diffusers", f"--checkpoint={root / 'run'}", f"--output={root / 'unet'}", "--dtype=float32")
    return root / "run", root / "unet"


def _succeed(*arguments):
    result = run(*arguments)
    assert result.code == 0, result.err
    return result.out


def _metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_an_autoencoder_samples_no_sets(vae, tmp_path):
    result = run("sample", f"--checkpoint={vae[0]}", f"--output={tmp_path / 'out'}")
    assert result.code == 2 and "holds a run of task 'autoencoder', which samples no sets" in result.err
    assert not list(tmp_path.iterdir())


def test_autoencoder_trains(vae):
    trained, evaluated = [[x for x in _metrics(vae[0]) if name in x] for name in ("train/loss", "eval/psnr_db")]
    assert [x["step"] for x in trained] == [2, 4]
    assert trained[1]["train/loss"] < trained[0]["train/loss"]
    assert {"train/absolute_error", "train/kl"} <= set(trained[0])
    assert [x["step"] for x in evaluated] == [4]
    assert {"step", "eval/psnr_db", "eval/latent_std"} == set(evaluated[0])
    assert (vae[0] / "samples" / "0000004.png").exists()


def test_autoencoder_folder(vae):
    workdir, folder, printed = vae
    config, params = load_autoencoder_config(folder), load_params(folder)
    assert config.block_out_channels == (16, 16, 16)
    assert f"scaling factor {config.scaling_factor:.5f}" in printed
    # Unit variance over the training data: the evaluation's figure is of unscaled latents of validation images.
    (std,) = [x["eval/latent_std"] for x in _metrics(workdir) if "eval/latent_std" in x]
    assert config.scaling_factor * std == pytest.approx(1.0, rel=0.3)
    trained = load_for_sampling(workdir).ema_params
    assert params.keys() == trained.keys()
    for name, value in params.items():  # stored as float16
        np.testing.assert_allclose(value, trained[name], rtol=1e-3, atol=1e-6)


def test_an_autoencoder_goes_on_from_a_folder(vae):
    config = load_config("emoji_vae:tiny")
    config.init.path = str(vae[1])
    task = TASKS.choose(config.task)(config)
    for name, value in load_params(vae[1]).items():
        np.testing.assert_array_equal(task.init()[name], value)
    config.autoencoder.update({"block_out_channels": (16, 16, 32)})
    with pytest.raises(UserError, match=re.escape(str(vae[1]))):
        TASKS.choose(config.task)(config).init()


def test_finished_run_has_nothing_left_to_do(vae, emoji_directory):
    workdir = vae[0]
    metrics, files = _metrics(workdir), {path for path in workdir.rglob("*") if "tensorboard" not in str(path)}
    arguments = (config_argument("emoji_vae:tiny"), f"--config.data.directory={emoji_directory}")
    assert "resumed at step 4" in _succeed("train", *arguments, f"--workdir={workdir}")
    assert _metrics(workdir) == metrics
    assert {path for path in workdir.rglob("*") if "tensorboard" not in str(path)} == files


def test_single_image_model_trains_and_saves(base):
    workdir, folder = base
    losses = [x["train/loss"] for x in _metrics(workdir) if "train/loss" in x]
    assert len(losses) == 2 and np.all(np.isfinite(losses))
    config = load_unet_config(folder)
    assert (config.attentions, config.block_out_channels, config.num_attention_heads) == (("self",), (16, 32), (2, 4))
    trained = load_for_sampling(workdir).ema_params
    saved = load_params(folder)
    assert saved.keys() == trained.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(value, trained[name])
    schedule = json.loads((folder / "scheduler_config.json").read_text())
    assert NoiseSchedule.from_config(schedule) == NoiseSchedule.from_config(
        load_for_sampling(workdir).metadata["config"]["schedule"]
    )


def test_m2m_starts_as_the_single_image_model(vae, base):
    """At step 0 the network is the pretrained one, whatever the context; afterwards the context can come in."""
    config = load_config("emoji:tiny")
    config.autoencoder.path, config.init.path = str(vae[1]), str(base[1])
    task = SetDiffusion(config)
    params = task.init()
    assert params.keys() == task.shapes.keys()

    pretrained = load_params(base[1])
    for name, value in params.items():
        if name in pretrained:
            np.testing.assert_array_equal(value, pretrained[name])
        else:
            assert is_set_attention(name)
            assert name.endswith(("to_out.kernel", "bias")) or np.any(value)

    keys = jax.random.split(jax.random.key(0), 3)
    context, other, noised = (jax.random.normal(key, (2, 3, 8, 8, 4)) for key in keys)
    timestep = jnp.array([[900, 500, 20], [700, 300, 100]])

    @jax.jit
    def predict(params, clean):
        layout = SetLayout((0, 1, 2), (0, 1, 3))
        return denoise_sets(merge(task.unet, params), clean, noised, timestep, layout, clean_timestep=0)

    base_config = load_config("emoji_base:tiny")
    base_config.autoencoder.path = str(vae[1])
    base_task = SetDiffusion(base_config)
    alone = jax.jit(lambda params, x, t: merge(base_task.unet, params)(x, t)[0])(
        pretrained, noised.reshape(6, 8, 8, 4), timestep.reshape(6)
    )
    assert np.std(alone) > 1e-4  # after four steps it predicts something
    np.testing.assert_allclose(predict(params, context).reshape(alone.shape), alone, atol=1e-6)
    np.testing.assert_allclose(predict(params, other), predict(params, context), atol=1e-6)

    moved = {name: x + 0.1 if ".attn2.to_out.kernel" in name else x for name, x in params.items()}
    assert np.abs(predict(moved, other) - predict(moved, context)).max() > 1e-6

    larger = pretrained | {"conv_in.kernel": np.zeros((3, 3, 4, 32), np.float32)}
    with pytest.raises(UserError, match=r"init\.path=there does not fit config\.model: conv_in\.kernel is"):
        from_pretrained(params, drawn_from(params), task.unet_config, larger, base_task.unet_config, "there")


@pytest.mark.parametrize("where", ["unet", "scheduler"])
def test_another_schedule_than_that_of_the_start_is_told_of(where, tmp_path, capsys):
    """Beside the U-Net, as it is saved here, or in the folder of a pipeline."""
    shutil.copytree(ROOT / "pretrained" / "unet", tmp_path / "unet")
    (tmp_path / where).mkdir(exist_ok=True)
    file = (tmp_path / "unet" / "scheduler_config.json").rename(tmp_path / where / "scheduler_config.json")
    config = load_config("emoji")
    config.autoencoder.path, config.init.path = str(ROOT / "pretrained" / "vae"), str(tmp_path / "unet")
    SetDiffusion(config).init()
    assert capsys.readouterr().err == ""

    config.schedule.prediction_type, config.schedule.rescale_betas_zero_snr = "epsilon", False
    SetDiffusion(config).init()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and str(tmp_path / "unet") in line
    assert line.endswith("rescale_betas_zero_snr is True, not False; prediction_type is v_prediction, not epsilon")

    file.write_text('{"_class_name": "EDMEulerScheduler"}')
    SetDiffusion(config).init()
    assert "is not compared" in capsys.readouterr().err

    for damaged in ("{", '{"num_train_timesteps": "many"}'):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"scheduler_config\.json is"):
            SetDiffusion(config).init()
