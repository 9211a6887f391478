"""M2M-DINO's Image-Set Attention: tokens of an image encoder as keys, under the same mask. And the order embedding."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit, random_params

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

NUM_IMAGES, TOKENS, WIDTH = 3, 5, 12
RNG = np.random.default_rng(0)
NOISED = RNG.standard_normal((2, NUM_IMAGES, 4, 4, 4)).astype(np.float32)
CONTEXT, OTHER = RNG.standard_normal((2, 2, NUM_IMAGES, TOKENS, WIDTH)).astype(np.float32)
TIMESTEP = RNG.integers(0, 1000, (2, NUM_IMAGES), np.int32)


@functools.cache
def denoiser(layout: SetLayout, backend: str, order_embedding: bool = False, gradients: bool = False):
    """`(context, noised, timestep, keep_context_b) -> outputs`, compiled, at random weights without a zero.

    With `gradients`: `(..., cotangents) -> (gradient of the context, of the noised images)`.
    """
    config = UNetConfig(
        block_out_channels=(16,),  # one level has four transformers: down, middle and two up
        down_block_types=("CrossAttnDownBlock2D",),
        layers_per_block=1,
        num_attention_heads=(2,),
        norm_num_groups=8,
        context_dim=WIDTH if layout.encoded else None,
        order_embedding=order_embedding,
        clean_sees=layout.clean_sees,
        attention_backend=backend,
    )
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))
    params = random_params(shapes)

    def run(context, noised, timestep, keep_context_b=None):
        unet = merge(graphdef, params)
        return denoise_sets(unet, context, noised, timestep, layout, clean_timestep=0, keep_context_b=keep_context_b)

    def vjp(context, noised, timestep, cotangents):
        return jax.vjp(lambda *inputs: run(*inputs, timestep), context, noised)[1](cotangents)

    return quick_jit(vjp if gradients else run)


TRAINING = SetLayout.training(NUM_IMAGES, encoded=True)


@pytest.mark.parametrize("backend", ["dense", "prefix"])
def test_no_image_sees_tokens_of_itself_or_of_later_ones(backend):
    run = denoiser(TRAINING, backend)
    before = run(CONTEXT[:, :-1], NOISED, TIMESTEP)
    for j in range(NUM_IMAGES - 1):
        context = CONTEXT[:, :-1].copy()
        context[:, j] = OTHER[:, j]
        after = run(context, NOISED, TIMESTEP)
        np.testing.assert_array_equal(after[:, : j + 1], before[:, : j + 1])
        for i in range(j + 1, NUM_IMAGES):
            assert np.any(after[:, i] != before[:, i])


@pytest.mark.parametrize("backend", ["dense", "prefix"])
def test_no_gradient_reaches_what_an_image_does_not_see(backend):
    run = denoiser(TRAINING, backend, gradients=True)
    for i in range(NUM_IMAGES):
        cotangents = np.zeros_like(NOISED)
        cotangents[:, i] = NOISED[:, i]
        of_context, of_noised = run(CONTEXT[:, :-1], NOISED, TIMESTEP, cotangents)
        assert [bool(np.any(of_context[:, j])) for j in range(NUM_IMAGES - 1)] == [j < i for j in range(NUM_IMAGES - 1)]
        assert [bool(np.any(of_noised[:, j])) for j in range(NUM_IMAGES)] == [j == i for j in range(NUM_IMAGES)]


@pytest.mark.parametrize("order_embedding", [False, True])
@pytest.mark.parametrize("backend", ["dense", "prefix"])
def test_the_teacher_forced_pass_is_the_sampling_pass_image_by_image(backend, order_embedding):
    forced = denoiser(TRAINING, backend, order_embedding)(CONTEXT[:, :-1], NOISED, TIMESTEP)
    for i in range(NUM_IMAGES):
        layout = SetLayout.sampling(i, encoded=True)
        run = denoiser(layout, backend, order_embedding)
        alone = run(CONTEXT[:, :i] if i else None, NOISED[:, i : i + 1], TIMESTEP[:, i : i + 1])[:, 0]
        np.testing.assert_allclose(forced[:, i], alone, rtol=1e-5, atol=1e-5, err_msg=f"image {i}")


def test_context_dropout_is_no_context_at_all():
    run = denoiser(TRAINING, "prefix")
    keep_context_b = np.asarray([True, False])
    kept, some = run(CONTEXT[:, :-1], NOISED, TIMESTEP), run(CONTEXT[:, :-1], NOISED, TIMESTEP, keep_context_b)
    none = denoiser(SetLayout((), tuple(range(NUM_IMAGES)), encoded=True), "prefix")(None, NOISED, TIMESTEP)
    np.testing.assert_allclose(some[0], kept[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(some[1], none[1], rtol=1e-5, atol=1e-5)
    assert np.abs(kept[1, 1:] - none[1, 1:]).max() > 0.1


@pytest.mark.parametrize("encoded", [False, True], ids=["M2M-Self", "M2M-DINO"])
@pytest.mark.parametrize("order_embedding", [False, True])
def test_the_order_of_the_context_counts_where_it_is_told(encoded, order_embedding):
    layout = SetLayout.sampling(2, "itself", encoded)
    context = (CONTEXT if encoded else RNG.standard_normal(NOISED.shape).astype(np.float32))[:, :2]
    run = denoiser(layout, "dense", order_embedding)
    out = run(context, NOISED[:, 2:], TIMESTEP[:, 2:])
    turned = run(context[:, ::-1], NOISED[:, 2:], TIMESTEP[:, 2:])
    difference = np.abs(turned - out).max()
    assert difference > 0.05 if order_embedding else difference < 1e-4
