"""Training equals sampling: one pass over a whole set computes what image-by-image passes do for the same inputs."""

import functools

import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit, random_params

from m2m_jax.attention.layout import CLEAN_SEES, SetLayout
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

NUM_IMAGES = 3
FORMS = [(backend, clean_sees) for backend in ("dense", "prefix") for clean_sees in CLEAN_SEES]
RNG = np.random.default_rng(0)
CLEAN, NOISED = (RNG.standard_normal((2, NUM_IMAGES, 4, 4, 4)).astype(np.float32) for _ in range(2))
TIMESTEP = RNG.integers(0, 1000, (2, NUM_IMAGES), np.int32)


@functools.cache
def denoiser(layout: SetLayout, backend: str):
    """`(clean, noised, timestep) -> output`, compiled, at random weights without a zero among them."""
    config = UNetConfig(
        block_out_channels=(16,),  # one level has four transformers: down, middle and two up
        down_block_types=("CrossAttnDownBlock2D",),
        layers_per_block=1,
        num_attention_heads=(2,),
        norm_num_groups=8,
        clean_sees=layout.clean_sees,
        attention_backend=backend,
    )
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))

    @quick_jit
    def run(params, clean, noised, timestep):
        return denoise_sets(merge(graphdef, params), clean, noised, timestep, layout, clean_timestep=0)

    return functools.partial(run, random_params(shapes))


def sampling_pass(backend: str, clean_sees: str, num_context: int, noised_b1hwc, timestep_b1):
    """What a sampler computes for the next image when `num_context` images are finished."""
    layout = SetLayout.sampling(num_context, clean_sees)
    return denoiser(layout, backend)(CLEAN[:, :num_context], noised_b1hwc, timestep_b1)[:, 0]


@pytest.mark.parametrize(("backend", "clean_sees"), FORMS)
def test_the_teacher_forced_pass_is_the_sampling_pass_image_by_image(backend, clean_sees):
    forced = denoiser(SetLayout.training(NUM_IMAGES, clean_sees), backend)(CLEAN[:, :-1], NOISED, TIMESTEP)
    for i in range(NUM_IMAGES):
        alone = sampling_pass(backend, clean_sees, i, NOISED[:, i : i + 1], TIMESTEP[:, i : i + 1])
        np.testing.assert_allclose(forced[:, i], alone, rtol=1e-5, atol=1e-5, err_msg=f"image {i}")
    assert np.abs(forced).max() > 0.1


@pytest.mark.parametrize(("backend", "clean_sees"), FORMS)
def test_one_image_at_every_position_is_that_image_in_every_context(backend, clean_sees):
    """The layout of `tasks.evaluation`: one noised image at positions 0 .. n - 1 sees 0 .. n - 1 context images."""
    noised, timestep = NOISED[:, -1:], TIMESTEP[:, -1:]
    repeated = noised.repeat(NUM_IMAGES, 1), timestep.repeat(NUM_IMAGES, 1)
    together = denoiser(SetLayout.training(NUM_IMAGES, clean_sees), backend)(CLEAN[:, :-1], *repeated)
    for k in range(NUM_IMAGES):
        alone = sampling_pass(backend, clean_sees, k, noised, timestep)
        np.testing.assert_allclose(together[:, k], alone, rtol=1e-5, atol=1e-5, err_msg=f"{k} context images")
        assert k == 0 or np.abs(together[:, k] - together[:, k - 1]).max() > 0.1


@pytest.mark.parametrize("clean_sees", CLEAN_SEES)
def test_the_order_of_the_context_counts_as_configured(clean_sees):
    run = denoiser(SetLayout.sampling(2, clean_sees), "dense")
    out = run(CLEAN[:, :2], NOISED[:, 2:], TIMESTEP[:, 2:])
    turned = run(CLEAN[:, 1::-1], NOISED[:, 2:], TIMESTEP[:, 2:])
    difference = np.abs(turned - out).max()
    assert difference < 1e-4 if clean_sees == "itself" else difference > 0.1
