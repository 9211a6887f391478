"""What is computed in which dtype, and at which precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit, random_params

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.clip_text import CLIPTextConfig
from m2m_jax.models.dinov2 import DINOv2Config
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

CONFIG = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    num_attention_heads=(2, 2),
    norm_num_groups=8,
)
LAYOUT = SetLayout.training(3)
MODELS = FrozenModels(
    AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4),
    DINOv2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, image_size=8, patch_size=4),
    8,
    CLIPTextConfig(vocab_size=8, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3),
)


def denoise(config: UNetConfig):
    """`(params, clean, noised, timestep) -> predictions`."""
    graphdef, _ = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))

    def run(params, clean, noised, timestep):
        return denoise_sets(merge(graphdef, params), clean, noised, timestep, LAYOUT, clean_timestep=0)

    return run


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 2, 3, 4, 4, 4)).astype(np.float32)
    return latents[0, :, :2], latents[1], rng.integers(0, 1000, (2, 3), np.int32)


def test_the_ends_of_the_network_are_float32_in_bfloat16():
    """What bfloat16 costs stays what its blocks cost: the output is not rounded."""
    params = random_params(abstract(lambda: UNet(CONFIG, rngs=nnx.Rngs(0)))[1])
    exact = quick_jit(denoise(CONFIG))(params, *inputs())
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote bfloat16
        half = quick_jit(denoise(dataclasses.replace(CONFIG, dtype="bfloat16")))(params, *inputs())
    assert half.dtype == jnp.float32
    rounded = np.asarray(half.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.mean(rounded != half) > 0.9
    error = np.abs(half - exact)
    assert error.max() < 0.05 * np.abs(exact).max()
    assert error.mean() < 0.025 * np.abs(exact).mean()


def precisions(function, *arguments) -> list:
    """The precision of every product in a program and in all that it calls."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append(equation.params["precision"])
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
IMAGES = jax.ShapeDtypeStruct((1, 2, 8, 8, 3), jnp.uint8)
FROZEN = {
    "encode": IMAGES,
    "decode": jax.ShapeDtypeStruct((1, 2, 4, 4, 4), jnp.float32),
    "context": IMAGES,
    "encode_text": jax.ShapeDtypeStruct((1, 5), jnp.int32),
}


@pytest.mark.parametrize("method", FROZEN)
def test_every_product_of_the_frozen_models_is_of_the_configured_precision(method):
    highest = dataclasses.replace(MODELS, precision="highest")
    found = precisions(getattr(highest, method), highest.shapes, FROZEN[method])
    assert found and set(found) == {HIGHEST}
    assert precisions(getattr(MODELS, method), MODELS.shapes, FROZEN[method])[-1] != HIGHEST


def test_every_product_of_the_unet_and_its_gradient_is_of_the_configured_precision():
    config = dataclasses.replace(CONFIG, precision="highest")
    shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))[1]
    found = precisions(jax.grad(lambda *args: denoise(config)(*args).sum()), shapes, *inputs())
    assert found and set(found) == {HIGHEST}


def test_the_precision_of_a_checkpoint_is_kept():
    highest = dataclasses.replace(MODELS, precision="highest")
    assert FrozenModels.from_metadata(highest.metadata) == highest
    before = {name: value for name, value in MODELS.metadata.items() if name != "precision"}
    assert FrozenModels.from_metadata(before) == MODELS
    with pytest.raises(UserError, match="precision is 'high'; it takes default, highest"):
        FrozenModels.from_metadata({**before, "precision": "high"})
