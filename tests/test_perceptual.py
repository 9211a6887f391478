"""The perceptual network: read from torch's old format, converted, and a part of the first stage's loss."""

import collections
import pickle
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import load_config
from safetensors.numpy import save_file

from m2m_jax.data import prepare_stlpips
from m2m_jax.data.torch_legacy import read_legacy_torch
from m2m_jax.errors import UserError
from m2m_jax.models import stlpips
from m2m_jax.models.frozen import AUTOENCODER, of_models
from m2m_jax.tasks.autoencoding import PERCEPTUAL, Autoencoding

PICKLE = {"protocol": 2}


@pytest.fixture
def write_legacy(tmp_path, monkeypatch):
    """A function that writes arrays as torch did before version 1.6."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    class FloatStorage:
        pass

    def _rebuild_tensor_v2():
        pass

    FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Storage:
        def __init__(self, key, count):
            self.key, self.count = key, count

    class Tensor:
        def __init__(self, storage, array):
            strides = tuple(stride // 4 for stride in array.strides)
            self.arguments = storage, 0, array.shape, strides, False, collections.OrderedDict()

        def __reduce__(self):
            return _rebuild_tensor_v2, self.arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, one):
            if isinstance(one, Storage):
                return "storage", FloatStorage, one.key, "cpu", one.count, None
            return None

    def write(arrays, name="weights.pth"):
        path = tmp_path / name
        with open(path, "wb") as file:
            for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(header, file, **PICKLE)
            tensors = {k: Tensor(Storage(str(i), x.size), x) for i, (k, x) in enumerate(arrays.items())}
            Pickler(file, **PICKLE).dump(collections.OrderedDict(tensors))
            pickle.dump([str(i) for i in range(len(arrays))], file, **PICKLE)
            for x in arrays.values():
                file.write(struct.pack("<q", x.size) + x.astype("<f4").tobytes())
        return path

    return write


def random_params(seed=0):
    """Of the real shapes: He's variance, so that features neither vanish nor explode."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in stlpips.shapes().items():
        value = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("kernel"):
            value *= np.float32(np.sqrt(2 / np.prod(shape[:3])))
        params[name] = np.abs(value) if name.startswith("lin") else value
    params["scale"], params["shift"] = np.full(3, 0.45, np.float32), np.zeros(3, np.float32)
    return params


def as_torch(params):
    """The names and layouts of the package's file."""
    slices = {conv: number for number, (convs, _) in enumerate(stlpips.SLICES, start=1) for conv in convs}
    state = {f"scaling_layer.{name}": params[name].reshape(1, 3, 1, 1) for name in ("shift", "scale")}
    for conv, number in slices.items():
        kernel = params[f"conv{conv}.kernel"].transpose(3, 2, 0, 1)
        state[f"net.slice{number}.{conv}.weight"] = np.ascontiguousarray(kernel)
        state[f"net.slice{number}.{conv}.bias"] = params[f"conv{conv}.bias"]
    state["net.slice2.5.filt"] = np.tile(np.float32(np.outer([1, 2, 1], [1, 2, 1]) / 16), (64, 1, 1, 1))
    return state | {f"lin{i}.model.1.weight": params[f"lin{i}"].reshape(1, -1, 1, 1) for i in range(5)}


def test_state_dicts_are_read_without_torch(write_legacy):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([7])}
    found = read_legacy_torch(write_legacy(arrays))
    assert list(found) == ["a", "b"]
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x)


def test_what_is_no_tensor_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path / "harm").touch, ()

    path = tmp_path / "weights.pth"
    with open(path, "wb") as file:
        for one in (0x1950A86A20F9469CFC6C, 1001, {}, Harmful()):
            pickle.dump(one, file, **PICKLE)
    with pytest.raises(UserError, match="no state dict"):
        read_legacy_torch(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("keep", [0, 40, 300, -3])
def test_a_cut_file_is_refused(write_legacy, keep):
    path = write_legacy({"a": np.ones((4, 5), np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="no state dict"):
        read_legacy_torch(path)


def test_transposed_tensors_are_refused_and_not_misread(write_legacy):
    with pytest.raises(UserError, match="not contiguous"):
        read_legacy_torch(write_legacy({"a": np.ones((4, 5), np.float32).T}))


def test_the_package_is_converted_and_loaded(write_legacy, tmp_path, monkeypatch):
    params = random_params()
    monkeypatch.setattr(prepare_stlpips, "package_file", lambda: write_legacy(as_torch(params)))
    about = {"Version": "0", "License": "a licence"}
    monkeypatch.setattr(prepare_stlpips.importlib.metadata, "metadata", lambda name: about)
    prepare_stlpips.prepare_stlpips(tmp_path / "made")
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
        prepare_stlpips.convert({"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)})


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
    with config.unlocked():
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
