"""Stable Diffusion 2.1's U-Net and autoencoder at full size, once against torch: `make test-full`, 16 GB of memory."""

import resource

import jax
import numpy as np
import pytest
from flax import nnx
from parity_fixtures import random_model, to_numpy, to_torch

from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.diffusers_folder import save_autoencoder, save_unet
from m2m_jax.models.parameters import abstract, count, merge
from m2m_jax.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.slow

SD21 = UNetConfig(attn2="text", cross_attention_dim=1024)


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch", reason="parity with diffusers runs on torch, a test-only dependency")
    return pytest.importorskip("diffusers", reason="the reference of the parity tests, a test-only dependency")


def report(name: str, params, error: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{name}: {count(params):,} parameters, relative error {error:.1e}, peak memory {peak:.1f} GiB")


def relative_error(ours, theirs) -> float:
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_full_size_parameter_counts():
    """Of the published models, counted in torch."""
    sizes = {
        "text": (UNet, SD21, 865_910_724),
        "autoencoder": (AutoencoderKL, AutoencoderConfig(), 83_653_863),
    }
    for cls, config, expected in sizes.values():
        assert count(abstract(lambda cls=cls, config=config: cls(config, rngs=nnx.Rngs(0)))[1]) == expected


def test_unet_of_stable_diffusion_21_parity(diffusers, tmp_path):
    import torch

    graphdef, params = random_model.__wrapped__(UNet, SD21)  # not cached: it is 3.5 GB
    rng = np.random.default_rng(1)
    x, text = rng.standard_normal((1, 64, 64, 4), np.float32), rng.standard_normal((1, 77, 1024), np.float32)
    timestep = np.asarray([501], np.int32)
    ours = np.asarray(jax.jit(lambda p, *inputs: merge(graphdef, p)(*inputs))(params, x, timestep, text))

    save_unet(tmp_path, SD21, params)
    model, loading = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        theirs = to_numpy(model(to_torch(x), torch.from_numpy(timestep), torch.from_numpy(text)).sample)
    error = relative_error(ours, theirs)
    report("SD 2.1 U-Net", params, error)
    assert error <= 1e-4


def test_autoencoder_of_stable_diffusion_parity(diffusers, tmp_path):
    import torch

    config = AutoencoderConfig()
    graphdef, params = random_model.__wrapped__(AutoencoderKL, config)
    rng = np.random.default_rng(1)
    image, latent = (
        rng.uniform(-1, 1, (1, 256, 256, 3)).astype(np.float32),
        rng.standard_normal((1, 32, 32, 4), np.float32),
    )

    @jax.jit
    def run(params, image, latent):
        model = merge(graphdef, params)
        return model.posterior(image)[0], model.decode(latent)

    mean, decoded = run(params, image, latent)
    save_autoencoder(tmp_path, config, params)
    model, loading = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        their_mean = to_numpy(model.encode(to_torch(image)).latent_dist.mean)
        their_image = to_numpy(model.decode(to_torch(latent) / config.scaling_factor).sample)
    error = max(relative_error(mean, their_mean), relative_error(decoded, their_image))
    report("SD autoencoder", params, error)
    assert error <= 1e-4
