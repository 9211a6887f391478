"""Training equals sampling: one pass over a whole set computes what image-by-image passes do for the same inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2m_jax.attention.backends import BACKENDS
from m2m_jax.attention.layout import CLEAN_SEES, SetLayout
from m2m_jax.models.parameters import abstract, merge
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

NUM_IMAGES = 3
FORMS = [(backend, clean_sees) for backend in BACKENDS for clean_sees in CLEAN_SEES]
# These programs are compiled once and run on next to nothing.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
RNG = np.random.default_rng(0)
CLEAN, NOISED = (RNG.standard_normal((2, NUM_IMAGES, 4, 4, 4)).astype(np.float32) for _ in range(2))
TIMESTEP = RNG.integers(0, 1000, (2, NUM_IMAGES), np.int32)


@functools.cache
def denoiser(layout: SetLayout, backend: str):
    """`(clean, noised, timestep) -> output`, compiled, at random weights without a zero among them."""
    config = UNetConfig(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        norm_num_groups=8,
        clean_sees=layout.clean_sees,
        attention_backend=backend,
    )
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32) for name, x in shapes.items()}

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(params, clean, noised, timestep):
        return denoise_sets(merge(graphdef, params), clean, noised, timestep, layout, clean_timestep=0)

    return functools.partial(run, params)


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
    """The layout of `training.evaluation`: one noised image at positions 0 .. n - 1 sees 0 .. n - 1 context images."""
    noised, timestep = NOISED[:, -1:], TIMESTEP[:, -1:]
    repeated = noised.repeat(NUM_IMAGES, 1), timestep.repeat(NUM_IMAGES, 1)
    together = denoiser(SetLayout.training(NUM_IMAGES, clean_sees), backend)(CLEAN[:, :-1], *repeated)
    for k in range(NUM_IMAGES):
        alone = sampling_pass(backend, clean_sees, k, noised, timestep)
        np.testing.assert_allclose(together[:, k], alone, rtol=1e-5, atol=1e-5, err_msg=f"{k} context images")
        assert k == 0 or np.abs(together[:, k] - together[:, k - 1]).max() > 1e-2


def test_the_forms_of_attention_agree_and_the_order_of_the_context_counts_as_configured():
    def run(backend, clean_sees, clean):
        return denoiser(SetLayout.sampling(2, clean_sees), backend)(clean, NOISED[:, 2:], TIMESTEP[:, 2:])

    for clean_sees in CLEAN_SEES:
        outs = [run(backend, clean_sees, CLEAN[:, :2]) for backend in BACKENDS]
        for out in outs[1:]:
            np.testing.assert_allclose(out, outs[0], rtol=1e-5, atol=1e-5)
        turned = run("prefix", clean_sees, CLEAN[:, 1::-1])
        difference = np.abs(turned - outs[0]).max()
        assert difference < 1e-5 if clean_sees == "itself" else difference > 1e-3
