"""Stable Diffusion 2.1 and DINOv2-L at full size, once against torch: `make test-full PARITY=1`, 16 GB of memory."""

import dataclasses
import resource

import jax
import numpy as np
import pytest
from flax import nnx
from parity_fixtures import random_model, relative_error, to_numpy, to_torch

from m2m_jax.core.parameters import abstract, count, merge
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from m2m_jax.models.conditioning import Conditioning
from m2m_jax.models.diffusers_folder import save_autoencoder, save_unet
from m2m_jax.models.dinov2 import SIZES, DINOv2
from m2m_jax.models.transformers_folder import save_clip_text, save_dinov2
from m2m_jax.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.slow

SD21 = UNetConfig(attentions=("self", "text"), cross_attention_dim=1024)


def report(name: str, params, error: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{name}: {count(params):,} parameters, relative error {error:.1e}, peak memory {peak:.1f} GiB")


def test_full_size_parameter_counts():
    """Of the published models, counted in torch."""
    sizes = {
        "SD 2.1 U-Net": (UNet, SD21, 865_910_724),
        "SD autoencoder": (AutoencoderKL, AutoencoderConfig(), 83_653_863),
        "SD 2.1 text encoder": (CLIPTextEncoder, CLIPTextConfig(), 340_387_840),
        "DINOv2-B": (DINOv2, SIZES["base"], 86_579_712),
        "DINOv2-L": (DINOv2, SIZES["large"], 304_367_616),
        "DINOv2-L with registers": (DINOv2, dataclasses.replace(SIZES["large"], num_register_tokens=4), 304_371_712),
        "DINOv2-g": (DINOv2, SIZES["giant"], 1_136_479_232),
    }
    for name, (cls, config, expected) in sizes.items():
        found = count(abstract(lambda cls=cls, config=config: cls(config, rngs=nnx.Rngs(0)))[1])
        print(f"\n{name}: {found:,} parameters")
        assert found == expected


def test_unet_of_stable_diffusion_21_parity(diffusers, tmp_path):
    import torch

    graphdef, params = random_model.__wrapped__(UNet, SD21)  # not cached: it is 3.5 GB
    rng = np.random.default_rng(1)
    x, text = rng.standard_normal((1, 64, 64, 4), np.float32), rng.standard_normal((1, 77, 1024), np.float32)
    timestep = np.asarray([501], np.int32)

    @jax.jit
    def run(params, x, timestep, text):
        return merge(graphdef, params)(x, timestep, Conditioning(text_bsc=text))[0]

    ours = np.asarray(run(params, x, timestep, text))

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


def test_dinov2_large_parity(transformers, tmp_path):
    """At 224 pixels, for which the position embeddings of 518 are interpolated."""
    import torch

    config = SIZES["large"]
    graphdef, params = random_model.__wrapped__(DINOv2, config)  # not cached: it is 1.2 GB
    images_bhwc = np.random.default_rng(1).standard_normal((1, 224, 224, 3), np.float32)
    ours = np.asarray(jax.jit(lambda p, x: merge(graphdef, p)(x))(params, images_bhwc))

    save_dinov2(tmp_path, config, params)
    model, loading = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        theirs = to_numpy(model.eval()(to_torch(images_bhwc)).last_hidden_state)
    error = relative_error(ours, theirs)
    report("DINOv2-L", params, error)
    assert error <= 1e-4


def test_text_encoder_of_stable_diffusion_21_parity(transformers, tmp_path):
    import torch

    config = CLIPTextConfig()
    graphdef, params = random_model.__wrapped__(CLIPTextEncoder, config)
    ids_bs = np.random.default_rng(1).integers(0, config.vocab_size, (1, 77), np.int32)
    states, pooled = jax.jit(lambda p, ids: merge(graphdef, p)(ids))(params, ids_bs)

    save_clip_text(tmp_path, config, params)
    model, loading = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(ids_bs).long())
    pairs = (states, theirs.last_hidden_state), (pooled, theirs.pooler_output)
    error = max(relative_error(ours, to_numpy(x)) for ours, x in pairs)
    report("SD 2.1 text encoder", params, error)
    assert error <= 1e-4
