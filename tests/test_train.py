"""The training program: what it writes, and folders as data."""

import shutil

import jax
import numpy as np
import pytest
from compare_runs import TIMINGS, examples, metric_lines, saved_arrays
from data_fixtures import write_image_folder
from PIL import Image
from run_fixtures import load_config, run, train_tiny

from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.core.parameters import fingerprint
from m2m_jax.models.diffusers_folder import load_params
from m2m_jax.training import sharding
from m2m_jax.training.run import train

MODULES = ("conv_in", "time_embedding", "down_blocks.0", "mid_block", "up_blocks.0", "conv_norm_out", "conv_out")
NORMS = {"gradient_norm", *(f"gradient_norm/{module}" for module in MODULES)}
COUNTS = {"skipped_steps", "skipped_batches", "gradient_spikes"}
TRAIN = {"loss", "loss_first", "loss_last", "learning_rate"} | NORMS | COUNTS
EVAL = {"loss_own_context", "loss_other_context", *(f"loss_by_context_size/{k}" for k in range(4))}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train_tiny(tmp_path_factory)


def test_metrics(tiny_run):
    metrics = metric_lines(tiny_run.workdir)
    trained = [line for line in metrics if "train/loss" in line]
    evaluated = [line for line in metrics if "eval/loss_own_context" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluated] == [3, 6]
    for line in trained:
        assert set(line) == {"step", *(f"train/{name}" for name in TRAIN | TIMINGS)}
        assert 0.0 < line["train/loss"] < 10.0
        assert 0.0 <= line["train/data_wait_share"] <= 1.0
        of_modules = [line[f"train/gradient_norm/{module}"] for module in MODULES]
        assert line["train/gradient_norm"] == pytest.approx(np.linalg.norm(of_modules), rel=1e-5)
        assert not any(line[f"train/{name}"] for name in COUNTS)
    for line in evaluated:
        assert set(line) == {"step", *(f"eval/{name}" for name in EVAL)}
        # The whole context of a set of four is three images.
        assert line["eval/loss_own_context"] == line["eval/loss_by_context_size/3"]
    # Noise and timesteps of an evaluation are fixed: what differs is the model.
    assert evaluated[1]["eval/loss_own_context"] < evaluated[0]["eval/loss_own_context"]
    # A warm-up of two steps, and a cosine to the end.
    rates = [line["train/learning_rate"] for line in trained]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(5e-4)
    assert rates[2] > rates[3] > rates[4] > rates[5] > 0.0


def test_terminal(tiny_run):
    assert "set_diffusion, attention by prefix: " in tiny_run.out  # what auto is on a CPU
    assert "from scratch" in tiny_run.out
    assert tiny_run.out.count("compiled in") == 1
    assert "step 6/6  loss " in tiny_run.out
    assert "step 6: eval/loss_other_context" in tiny_run.out


def test_samples_and_tensorboard(tiny_run):
    grids = sorted((tiny_run.workdir / "samples").iterdir())
    assert [grid.name for grid in grids] == ["0000003.png", "0000006.png"]
    for grid in grids:
        pixels = np.asarray(Image.open(grid))
        assert pixels.std() > 1.0
    (events,) = (tiny_run.workdir / "tensorboard").iterdir()
    written = events.read_bytes()
    for tag in (b"train/loss", b"train/data_wait_share", b"eval/loss_own_context", b"samples"):
        assert tag in written


def test_checkpoints_hold_the_config_and_samples_autoencoder(tiny_run):
    assert sorted(path.name for path in (tiny_run.workdir / "checkpoints").iterdir()) == ["3", "6"]
    saved = load_for_sampling(tiny_run.workdir)
    assert saved.step == 6
    assert saved.metadata["config"]["train"]["steps"] == 6
    assert saved.metadata["config"]["autoencoder"]["path"] == str(tiny_run.autoencoder)
    assert saved.metadata["sha256"] == {"autoencoder": fingerprint(load_params(tiny_run.autoencoder))}
    assert saved.metadata["frozen"]["autoencoder"]["block_out_channels"] == [16, 16, 16]
    assert "decoder.conv_out.kernel" in saved.frozen["autoencoder"]
    arrays = saved_arrays(tiny_run.workdir, 6)
    assert arrays["train_state.step"] == 6
    average = {name.removeprefix("ema."): value for name, value in arrays.items() if name.startswith("ema.")}
    moved = [name for name, value in average.items() if not np.array_equal(value, arrays[f"train_state.params.{name}"])]
    assert len(moved) > 0.9 * len(average)


def test_examples(tiny_run):
    found = examples(tiny_run.workdir)
    assert [index for step in found for index in found[step]] == list(range(6 * 8))
    assert all(set_id.startswith(("style/", "content/")) for of_step in found.values() for set_id in of_step.values())


def test_what_a_step_would_move_by_itself_is_an_error(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_global_batch", lambda mesh, batch, batch_size: batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run("train", *tiny_run.arguments, f"--workdir={tmp_path}")


def test_any_folder_is_a_data_set(tiny_run, tmp_path):
    folder = write_image_folder(tmp_path / "images", num_sets=12, images_per_set=5)
    (folder / "set00" / "caption.txt").write_text("a caption")
    data = ("--config.data.name=folder", f"--config.data.path={folder}")
    result = run("train", *tiny_run.arguments, *data, f"--workdir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert "warning: the validation split has one set" in result.err
    losses = [line["train/loss"] for line in metric_lines(tmp_path / "run") if "train/loss" in line]
    assert len(losses) == 6 and np.all(np.isfinite(losses))
    assert load_for_sampling(tmp_path / "run").metadata["config"]["data"]["path"] == str(folder)


def test_a_run_is_called_from_python_and_one_that_is_complete_does_nothing(tiny_run, tmp_path, capsys):
    """Fewer steps than were taken are complete, too: a launcher that is told 75 would start it again for ever."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "run")
    config = load_config("emoji:tiny")
    config.model.update(block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), num_attention_heads=(2,))
    config.data.directory, config.autoencoder.path = tiny_run.emoji_directory, str(tiny_run.autoencoder)
    before = metric_lines(workdir)
    for steps in (6, 3):
        config.train.steps = steps
        assert train(config, workdir) == 0
        assert f"step 6 is saved, of {steps}: nothing is left" in capsys.readouterr().out
    assert metric_lines(workdir) == before
    # By these a resumed run tells whether its data are the same.
    assert load_for_sampling(workdir).metadata["listings"].keys() == {"train", "validation"}
