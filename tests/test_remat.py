"""What `model.remat` computes again, and that it changes no gradient."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit, random_params

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.remat import REMAT
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

CONFIG = UNetConfig(
    block_out_channels=(64, 128),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    num_attention_heads=(2, 2),
    norm_num_groups=8,
)
LAYOUT = SetLayout.training(3)


def gradient(config: UNetConfig):
    """`(params, clean, noised) -> gradient of the parameters`, and the parameters' shapes."""
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))

    def loss(params, clean, noised):
        timestep = jnp.full(noised.shape[:2], 7)
        out = denoise_sets(merge(graphdef, params), clean, noised, timestep, LAYOUT, clean_timestep=0)
        return jnp.mean(out**2)

    return jax.grad(loss), shapes


def lowered(remat: str, side: int, backend: str = "prefix") -> jax.stages.Lowered:
    config = dataclasses.replace(CONFIG, remat=remat, attention_backend=backend)
    run, shapes = gradient(config)
    clean, noised = (jax.ShapeDtypeStruct((1, n, side, side, 4), jnp.float32) for n in (2, 3))
    platform = "tpu" if backend == "splash" else "cpu"
    return jax.jit(run).trace(shapes, clean, noised).lower(lowering_platforms=(platform,))


def test_dots_computes_no_convolution_again_and_of_attention_the_weights_alone():
    texts, flops = {}, {}
    for remat in REMAT:
        found = lowered(remat, 8)
        texts[remat], flops[remat] = found.as_text(), found.cost_analysis()["flops"]
    count = {
        operation: {remat: len(re.findall(rf"stablehlo\.{operation}\b", text)) for remat, text in texts.items()}
        for operation in ("convolution", "dot_general")
    }
    assert count["convolution"]["dots"] == count["convolution"]["none"] < count["convolution"]["blocks"]
    # Of each of four blocks: two attentions, the second in two calls.
    assert count["dot_general"]["dots"] == count["dot_general"]["none"] + 4 * (1 + 2) < count["dot_general"]["blocks"]
    assert flops["none"] < flops["dots"] < 1.05 * flops["none"]
    assert 1.2 * flops["none"] < flops["blocks"]


def test_dots_runs_no_kernel_of_attention_again():
    kernels = {remat: lowered(remat, 16, "splash").as_text().count("splash_mha_fwd") for remat in REMAT}
    assert kernels["dots"] == kernels["none"] < kernels["blocks"]


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none"}))
def test_the_gradient_is_that_without_recomputation(remat):
    config = dataclasses.replace(CONFIG, block_out_channels=(16, 16))
    run, shapes = gradient(config)
    rng, params = np.random.default_rng(0), random_params(shapes)
    latents = [rng.standard_normal((1, n, 4, 4, 4)).astype(np.float32) for n in (2, 3)]
    expected = quick_jit(run)(params, *latents)
    found = quick_jit(gradient(dataclasses.replace(config, remat=remat))[0])(params, *latents)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-5 * np.abs(x).max(), err_msg=name)
