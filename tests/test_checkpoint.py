"""Checkpoints: bit-exact, on any mesh; which of them stay; and clear about what a run that goes on has changed."""

import hashlib
import json

import jax
import jax.numpy as jnp
import pytest
from checkpoint_fixtures import (
    FROZEN,
    METADATA,
    assert_bit_equal,
    create,
    save,
    save_three,
    steps_in,
    target,
)

import m2m_jax
from m2m_jax.checkpoints import checksums, saved_model
from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.checkpoints.config_changes import code_version, config_changes
from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.configuration import default_config, to_json
from m2m_jax.core.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 2 and 3 (1 was dropped), and the states."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, save_three(workdir)


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_round_trip_is_bit_exact_on_any_mesh(saved, mesh):
    workdir, states = saved
    wanted = target(states[3], *mesh)
    with Checkpointer(workdir, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored = checkpoints.restore_train_state(wanted)
        assert_bit_equal(restored, states[3])
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
        assert_bit_equal(checkpoints.restore_train_state(wanted, 2), states[2])
        assert checkpoints.metadata() == METADATA


def test_older_checkpoints_are_dropped(saved):
    assert steps_in(saved[0]) == ["2", "3"]


@pytest.mark.parametrize("folder", ["", "checkpoints", "checkpoints/3"])
def test_sampling_restores_the_average(saved, folder):
    workdir, states = saved
    model = load_for_sampling(workdir / folder)
    assert (model.metadata, model.step) == (METADATA, 3)
    assert_bit_equal(model.ema_params, states[3].ema_params)
    assert_bit_equal(model.frozen, FROZEN)


def test_sampling_from_an_older_one(saved):
    for model in (load_for_sampling(saved[0], 2), load_for_sampling(saved[0] / "checkpoints" / "2")):
        assert model.step == 2
        assert_bit_equal(model.ema_params, saved[1][2].ema_params)


def test_averages_of_what_does_not_train_are_passed_over(saved):
    """Earlier code saved them, too."""
    workdir, states = saved
    some = {name: x for name, x in states[3].ema_params.items() if "attn2" in name}
    with Checkpointer(workdir, keep=2) as checkpoints:
        restored = checkpoints.restore_train_state(target(states[3].replace(ema_params=some)))
    assert_bit_equal(restored, states[3].replace(ema_params=some))


def test_saving_a_step_again_keeps_the_first(saved):
    with Checkpointer(saved[0], keep=2) as checkpoints:
        save(checkpoints, 3, create())
    assert_bit_equal(load_for_sampling(saved[0]).ema_params, saved[1][3].ema_params)


def test_without_frozen_models(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, create(), frozen={}, metadata={})
    assert load_for_sampling(tmp_path).frozen == {}


def test_sha256sum_can_check_a_checkpoint(saved):
    """Every file of every item, in the format of coreutils."""
    folder = saved[0] / "checkpoints" / "3"
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    assert sorted(name for _, name in lines) == sorted(str(path.relative_to(folder)) for path in files)
    for digest, name in lines:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"train_state", "ema", "autoencoder", "about"}


def test_which_stay(tmp_path):
    """The last two, the multiples of four, the best two; also of those that an earlier run saved."""
    state, rules = create(), {"keep": 2, "keep_every": 4, "keep_best": 2}
    scores = {1: 0.5, 2: 0.3, 3: float("nan"), 4: 0.9, 5: None, 6: 0.4}
    with Checkpointer(tmp_path, **rules) as checkpoints:
        for step, score in scores.items():
            save(checkpoints, step, state, score)
    assert steps_in(tmp_path) == ["2", "4", "5", "6"]
    with Checkpointer(tmp_path, **rules) as checkpoints:
        for step, score in {7: None, 9: 0.2, 10: None, 11: None}.items():
            save(checkpoints, step, state, score)
    assert steps_in(tmp_path) == ["10", "11", "2", "4", "9"]


def test_other_leaves_are_named(saved, capsys):
    now = METADATA["config"] | {"sizes": [1, 3]}
    with Checkpointer(saved[0], keep=2) as checkpoints:
        other = create(("a.0.kernel", "a.1.norm.bias", "a.2.kernel"))
        with pytest.raises(UserError) as error:
            checkpoints.restore_train_state(target(other), metadata={"config": now})
        assert "params.a.2.kernel (not in the checkpoint)" in str(error.value)
        assert "params.a.1.attn2.kernel (only in the checkpoint)" in str(error.value)
        assert "since then config.sizes: [1, 2] -> [1, 3]" in str(error.value)

        state = create()
        state.params["a.0.kernel"] = jnp.zeros((16, 9))
        with pytest.raises(UserError, match=r"a\.0\.kernel \(float32\[16, 8\] in the checkpoint, float32\[16, 9\] now"):
            checkpoints.restore_train_state(target(state))
        assert capsys.readouterr().out == ""

        # The same leaves: the difference is printed, and does not stop the run.
        checkpoints.restore_train_state(target(create()), metadata={"config": now})
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("the config is not that of ") and lines[1:] == ["  config.sizes: [1, 2] -> [1, 3]"]
        checkpoints.restore_train_state(target(create()), metadata=METADATA)
        assert capsys.readouterr().out == ""


def test_other_frozen_models_are_refused(saved):
    with Checkpointer(saved[0], keep=2) as checkpoints:
        other = METADATA | {"sha256": {"autoencoder": "01"}}
        with pytest.raises(
            UserError, match=r"config.autoencoder.path=vae holds other weights than .*checkpoints/3 was"
        ):
            checkpoints.restore_train_state(target(create()), metadata=other)


def test_config_changes():
    was = to_json(default_config())
    assert config_changes(was, was) == []

    config = default_config()
    config.checkpoint.every, config.mesh.fsdp, config.data.threads, config.profile.steps = 7, 2, 3, (1, 2)
    assert config_changes(was, to_json(config)) == []

    config.optimizer.learning_rate, config.data.directory = 1e-3, "elsewhere"
    plain = ['config.data.directory: "data" -> "elsewhere"', "config.optimizer.learning_rate: 0.0003 -> 0.001"]
    assert config_changes(was, to_json(config)) == plain

    config.seed, config.data.batch_size = 1, 32
    *fields, consequence = config_changes(was, to_json(config))
    assert fields == [
        plain[0].replace("directory", "batch_size").replace('"data" -> "elsewhere"', "16 -> 32"),
        *plain,
        "config.seed: 0 -> 1",
    ]
    assert (
        consequence == "data.batch_size, seed decide on data and noise: the run will not be the one it would have been"
    )

    # Of another version: with other fields, and a group where there was one value.
    old = to_json(default_config())
    old["train"]["momentum"] = 0.5
    old["model"] = "unet"
    del old["diffusion"]["clean_timestep"]
    lines = config_changes(old, was)
    assert "config.train.momentum: 0.5 -> (no such field)" in lines
    assert "config.diffusion.clean_timestep: (no such field) -> 0" in lines
    assert 'config.model: "unet" -> (no such field)' in lines


def test_the_codes_version(saved, capsys, monkeypatch):
    assert code_version().startswith(m2m_jax.__version__)
    monkeypatch.setattr("m2m_jax.checkpoints.checkpointer.code_version", lambda: "99.0")
    with Checkpointer(saved[0], keep=2) as checkpoints:
        checkpoints.restore_train_state(target(create()), metadata=METADATA)
    assert f"was saved by m2m_jax {code_version()}; this is 99.0" in capsys.readouterr().out


def test_missing_and_empty_folders(tmp_path, saved):
    with pytest.raises(UserError, match=r"nowhere.*--workdir"):
        load_for_sampling(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_for_sampling(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 2, 3"):
        load_for_sampling(saved[0], 7)


@pytest.mark.parametrize("found", [0, 1, 99])
def test_other_formats_are_refused(tmp_path, monkeypatch, found):
    """What later code saved; and, when the format is another one some day, what today's and earlier code did.

    That which did not say is of format 1.
    """
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, create())
    folder = tmp_path / "checkpoints" / "1"
    about = json.loads((folder / "about" / "metadata").read_text())
    assert about["format"] == saved_model.FORMAT
    about = about | {"format": found} if found else {name: x for name, x in about.items() if name != "format"}
    (folder / "about" / "metadata").write_text(json.dumps(about))
    checksums.write(folder)
    if found < 2:
        assert load_for_sampling(tmp_path).step == 1
        monkeypatch.setattr(saved_model, "FORMAT", 2)
    words = (
        rf"checkpoints/1 has format {found or 1}, of m2m_jax .*, and this code reads format \d+: check that code out"
    )
    for read in (lambda: load_for_sampling(tmp_path), lambda: Checkpointer(tmp_path, keep=1)):
        with pytest.raises(UserError, match=words):
            read()
