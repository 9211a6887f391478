"""Numbers that go bad: one set of latents that is finite itself, and whose squared error is not."""

import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from compare_runs import metric_lines, saved_arrays, without_timings
from run_fixtures import ONE_LEVEL, config_argument, make_autoencoder, run

from m2m_jax.configuration import default_config
from m2m_jax.data import precomputed
from m2m_jax.data.pipeline import open_examples
from m2m_jax.data.records import ImageSetRecord
from m2m_jax.models.diffusers_folder import load_autoencoder_config, load_params
from m2m_jax.training.divergence import KNOWN_AFTER, ROLLBACKS, SKIPS, Divergence

NUM_SETS, BATCH, SHAPE = 128, 8, (4, 8, 8, 4)
STEPS, BAD_STEP = 9, 5  # saved after 3, 6 and 9
BAD = "(nan|inf)"


def _write(folder, split, autoencoder, latents):
    manifest = precomputed.Manifest(
        version=precomputed.VERSION,
        image_size=32,
        autoencoder=autoencoder,
        latent_shape=list(SHAPE[1:]),
        latent_dtype="float32",
        has_images=False,
        records_per_shard=len(latents),
        kinds=["style"] * len(latents),
        num_images=[SHAPE[0]] * len(latents),
        made_from="this test",
        command="this test",
    )
    precomputed.write_manifest(folder, split, manifest)
    sets = [ImageSetRecord(f"set{i:03d}", "style", "", (), (), x) for i, x in enumerate(latents)]
    precomputed.write_shard(precomputed.shard_path(folder, split, 0, 1), sets)


def _data_config(folder):
    config = default_config()
    config.data.update({"name": "precomputed", "path": str(folder), "images_per_set": SHAPE[0]})
    config.data.augment.enabled = False
    return config.data


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """(what names them on the command line, the id of the set that the batch of BAD_STEP has and no other batch)."""
    folder = tmp_path_factory.mktemp("bad")
    vae = make_autoencoder(folder / "vae")
    autoencoder = precomputed.describe_autoencoder(load_autoencoder_config(vae), load_params(vae))
    values = np.random.default_rng(0).normal(size=(NUM_SETS, *SHAPE)).astype(np.float32)
    _write(folder, "validation", autoencoder, values[:8])
    _write(folder, "train", autoencoder, values)
    bad, _ = open_examples(_data_config(folder), split="train", seed=0).choose((BAD_STEP - 1) * BATCH + 3)
    values[bad] = 1e30
    precomputed.manifest_path(folder, "train").unlink()
    _write(folder, "train", autoencoder, values)
    arguments = (
        config_argument("emoji:tiny"),
        "--config.data.name=precomputed",
        f"--config.data.path={folder}",
        "--config.data.augment.enabled=False",
        f"--config.autoencoder.path={vae}",
        *ONE_LEVEL,
        "--config.checkpoint.keep=3",
        "--config.eval.every=100",
        f"--config.train.steps={STEPS}",
    )
    return arguments, f"set{bad:03d}"


def _train(latents, workdir, *more):
    return run("train", *latents[0], *more, f"--workdir={workdir}")


def _assert_same(run, other):
    assert without_timings(run) == without_timings(other)
    expected, found = saved_arrays(run, STEPS), saved_arrays(other, STEPS)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_stop_and_then_skip(latents, tmp_path):
    """A run that stops says where and with what; continued as it says, it is the one that always skips."""
    stopped, skipping = tmp_path / "stopped", tmp_path / "skipping"
    result = _train(latents, stopped)
    assert result.code == 2 and result.err.count("\n") == 1
    said = rf"step {BAD_STEP}: the loss is {BAD} and the norm of the gradient {BAD} \(.*conv_in {BAD}, "
    assert re.search(said, result.err), result.err
    for words in (
        f"{latents[1]}",
        "the checkpoint of step 3 is good",
        "--config.train.on_nonfinite=skip",
    ):
        assert words in result.err
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["3"]
    assert metric_lines(stopped)[-1]["step"] == BAD_STEP - 1

    result = _train(latents, stopped, "--config.train.on_nonfinite=skip")
    assert result.code == 0 and "resumed at step 3" in result.out
    result = _train(latents, skipping, "--config.train.on_nonfinite=skip")
    assert result.code == 0, result.err
    assert re.search(rf"step {BAD_STEP}: the loss is {BAD}", result.out) and latents[1] in result.out, result.out
    _assert_same(skipping, stopped)
    lines = {line["step"]: line for line in metric_lines(skipping) if "train/loss" in line}
    assert sorted(lines) == list(range(1, STEPS + 1))
    for step, line in lines.items():
        assert (line["train/loss"] is None) == (step == BAD_STEP)
        assert line["train/skipped_steps"] == (step >= BAD_STEP)
        assert line["train/skipped_batches"] == 0
    # The rate is that of the updates.
    assert lines[BAD_STEP]["train/learning_rate"] == lines[BAD_STEP + 1]["train/learning_rate"]
    for name, value in saved_arrays(skipping, STEPS).items():
        assert np.all(np.isfinite(value)), name


def test_rollback(latents, tmp_path):
    workdir, rollback = tmp_path / "run", "--config.train.on_nonfinite=rollback"
    result = _train(latents, workdir, rollback)
    assert result.code == 0, result.err
    assert re.search(rf"step {BAD_STEP}: the loss is {BAD}", result.out) and latents[1] in result.out, result.out
    assert "rolled back to step 3; 2 batches are left out by now" in result.out
    lines = [line for line in metric_lines(workdir) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["train/skipped_batches"] for line in lines] == [0] * 3 + [2] * 6
    assert all(line["train/loss"] for line in lines) and not any(line["train/skipped_steps"] for line in lines)
    # A copy that goes on from the checkpoint after the rollback, as if it had died before the next.
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "9")
    result = _train(latents, copy, rollback)
    assert result.code == 0 and "resumed at step 6" in result.out, result.err
    _assert_same(workdir, copy)


@pytest.mark.parametrize(
    ("policy", "times"), [("rollback", ROLLBACKS), pytest.param("skip", SKIPS, marks=pytest.mark.slow)]
)
def test_what_does_not_help_is_given_up(latents, tmp_path, policy, times):
    """At these rates the second step is lost, and so are all that follow."""
    result = _train(
        latents,
        tmp_path / "run",
        f"--config.train.on_nonfinite={policy}",
        "--config.optimizer.learning_rate=4e9",
        "--config.optimizer.weight_decay=4e9",
        "--config.train.steps=40",
        "--config.checkpoint.every=100",
    )
    assert result.code == 2
    assert "no checkpoint has been saved yet" in result.err
    assert result.out.count("the loss is") == times
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_jump_of_the_gradient_is_told_and_counted():
    messages = []
    judge = Divergence(default_config(), None, None, messages.append)
    norms = [1.0, 1.2, *[1.0] * KNOWN_AFTER, 9.0, 11.0, 1.0, 30.0]
    for step, norm in enumerate(norms, 1):
        judge.add(step, {"finite": jnp.bool_(True), "gradient_norm": jnp.float32(norm)})
    assert judge.look(until=len(norms) - 1) is None
    assert judge.take_spikes() == 1
    assert judge.look(until=len(norms)) is None
    assert judge.take_spikes() == 1 and judge.take_spikes() == 0
    assert messages == [
        "step 24: the norm of the gradient is 11, 11 times the median of the last 23 steps",
        "step 26: the norm of the gradient is 30, 30 times the median of the last 25 steps",
    ]
