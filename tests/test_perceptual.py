"""The perceptual network: read from torch's old format, converted, and a part of the first stage's loss."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import load_config
from safetensors.numpy import save_file
from torch_fixtures import MAGIC, PROTOCOL, write_legacy

from m2m_jax.building import stlpips as stlpips_package
from m2m_jax.building.torch_legacy import read_legacy_torch
from m2m_jax.core.errors import UserError
from m2m_jax.models import stlpips
from m2m_jax.models.frozen import AUTOENCODER, of_models
from m2m_jax.tasks.autoencoding import PERCEPTUAL, Autoencoding


def random_params(seed=0, network="vgg"):
    """Of the real shapes: He's variance, so that features neither vanish nor explode."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in stlpips.shapes(network).items():
        value = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("kernel"):
            value *= np.float32(np.sqrt(2 / np.prod(shape[:3])))
        params[name] = np.abs(value) if name.startswith("lin") else value
    params["scale"], params["shift"] = np.full(3, 0.45, np.float32), np.zeros(3, np.float32)
    return params


def as_torch(params):
    """The names and layouts of the package's file."""
    slices = {
        conv: number for number, part in enumerate(stlpips.NETWORKS["vgg"], start=1) for conv in part.convolutions
    }
    state = {f"scaling_layer.{name}": params[name].reshape(1, 3, 1, 1) for name in ("shift", "scale")}
    for conv, number in slices.items():
        kernel = params[f"conv{conv}.kernel"].transpose(3, 2, 0, 1)
        state[f"net.slice{number}.{conv}.weight"] = np.ascontiguousarray(kernel)
        state[f"net.slice{number}.{conv}.bias"] = params[f"conv{conv}.bias"]
    state["net.slice2.5.filt"] = np.tile(np.float32(np.outer([1, 2, 1], [1, 2, 1]) / 16), (64, 1, 1, 1))
    return state | {f"lin{i}.model.1.weight": params[f"lin{i}"].reshape(1, -1, 1, 1) for i in range(5)}


def test_state_dicts_are_read_without_torch(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([7])}
    found = read_legacy_torch(write_legacy(tmp_path / "weights.pth", arrays))
    assert list(found) == ["a", "b"]
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x)


def test_what_is_no_tensor_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path / "harm").touch, ()

    path = tmp_path / "weights.pth"
    with open(path, "wb") as file:
        for one in (MAGIC, 1001, {}, Harmful()):
            pickle.dump(one, file, PROTOCOL)
    with pytest.raises(UserError, match="no state dict"):
        read_legacy_torch(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("keep", [0, 40, 300, -3])
def test_a_cut_file_is_refused(tmp_path, keep):
    path = write_legacy(tmp_path / "weights.pth", {"a": np.ones((4, 5), np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="no state dict"):
        read_legacy_torch(path)


def test_transposed_tensors_are_read_and_gaps_refused(tmp_path):
    whole = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    arrays = {"a": whole.transpose(2, 0, 1), "b": whole[:1].transpose(1, 0, 2), "c": whole.T}
    found = read_legacy_torch(write_legacy(tmp_path / "weights.pth", arrays))
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x)
    for gaps in (whole[..., ::2], np.broadcast_to(whole[:1], (3, 4, 5))):
        with pytest.raises(UserError, match="has gaps or overlaps"):
            read_legacy_torch(write_legacy(tmp_path / "gaps.pth", {"a": gaps}))


def test_the_package_is_converted_and_loaded(tmp_path, monkeypatch):
    params = random_params()
    file = write_legacy(tmp_path / "weights.pth", as_torch(params))
    monkeypatch.setattr(stlpips_package, "package_file", lambda network: file)
    about = {"Version": "0", "License": "a licence"}
    monkeypatch.setattr(stlpips_package.importlib.metadata, "metadata", lambda name: about)
    stlpips_package.prepare_stlpips(tmp_path / "made")
    loaded = stlpips.load_stlpips(tmp_path / "made")
    assert loaded.keys() == params.keys()
    for name, x in params.items():
        np.testing.assert_array_equal(loaded[name], x)
    assert "a licence" in (tmp_path / "made" / "LICENSE.md").read_text()


def test_another_network_and_none_name_the_remedy(tmp_path):
    with pytest.raises(UserError, match="prepare_stlpips"):
        stlpips.load_stlpips(tmp_path)
    save_file({"shift": np.zeros(3, np.float32)}, tmp_path / stlpips.WEIGHTS)
    with pytest.raises(UserError, match="another network"):
        stlpips.load_stlpips(tmp_path)
    with pytest.raises(UserError, match="another network"):
        stlpips_package.convert({"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)})


def test_distance_is_zero_for_equal_images_grows_with_difference_and_adds_slices():
    params = random_params()
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    near, far = images + 0.05, jnp.asarray(rng.uniform(-1, 1, images.shape), jnp.float32)
    compute = jax.jit(stlpips.distance, static_argnums=3)
    assert compute(params, images, images, 3).max() < 1e-9
    assert (compute(params, images, near, 3) < compute(params, images, far, 3)).all()
    assert (compute(params, images, far, 1) < compute(params, images, far, 2)).all()
    np.testing.assert_allclose(compute(params, images, far, 2), compute(params, far, images, 2), rtol=1e-5)
    gradient = jax.grad(lambda x: stlpips.distance(params, x, images, 2).sum())(images)
    assert np.isfinite(gradient).all()


def test_it_is_a_part_of_the_loss_and_of_no_checkpoint(tmp_path):
    save_file(random_params(), tmp_path / stlpips.WEIGHTS)
    config = load_config("sets_vae:tiny")
    plain = Autoencoding(config)
    config = copy.deepcopy(config)
    config.autoencoder.perceptual_path, config.autoencoder.perceptual_share = str(tmp_path), 0.5
    task = Autoencoding(config)
    assert of_models(task.frozen | {AUTOENCODER: {}}) == {AUTOENCODER: {}}

    rng = np.random.default_rng(0)
    batch = {"images_bnhwc": jnp.asarray(rng.integers(0, 256, (4, 1, 32, 32, 3)), jnp.uint8)}
    params = task.init()
    noise = task.draw(batch, jnp.int32(0))
    without, _ = plain.loss(params, plain.frozen, batch, noise)
    loss, metrics = task.loss(params, task.frozen, batch, noise)
    weighted = config.autoencoder.perceptual_weight * metrics["perceptual"]
    assert weighted > 0
    np.testing.assert_allclose(loss, without + weighted, rtol=1e-5)
    scores = task.evaluate(params, task.frozen, batch, jnp.int32(0))
    assert set(scores) == {"psnr_db", "latent_std", "st_lpips_vgg"}
    assert PERCEPTUAL in task.frozen
