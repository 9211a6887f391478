"""Single images left out of the context, by a mask that is data: as if they were not there, to the last gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import RUN_HERE, quick_jit, random_params
from test_attention import LAYOUTS, by_definition, qkv

from m2m_jax.attention.backends import BACKENDS
from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

CHOSEN = [layout for layout in LAYOUTS if len(layout.clean) > 1]


def keep(layout: SetLayout) -> np.ndarray:
    """Of two sets: one lacks its first clean image, the other keeps its last alone."""
    m = len(layout.clean)
    return np.stack([np.arange(m) > 0, np.arange(m) == m - 1])


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize("layout", CHOSEN[::2], ids=str)
def test_every_backend_leaves_out_what_is_not_kept(backend, layout):
    inputs, keep_bk = qkv(layout), keep(layout)
    mask_bqk = layout.mask_qk()[None] & keep_bk[:, None]

    @jax.jit
    def run(inputs, keep_bk):
        out, vjp = jax.vjp(lambda *args: BACKENDS[backend](*args, layout, keep_bk), *inputs)
        return out, vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    out, gradients = run(inputs, keep_bk)
    for b in range(2):
        expected = by_definition(*(x[b : b + 1] for x in inputs), layout, mask_bqk[b])
        np.testing.assert_allclose(out[b], expected[0], rtol=0, atol=1e-5)
        for x in gradients[1:]:
            assert [bool(np.any(x[b, j])) for j in range(len(layout.clean))] == mask_bqk[b].any(0).tolist()
        np.testing.assert_array_equal(gradients[0][b, ~mask_bqk[b].any(1)], 0)
    assert all(np.isfinite(x).all() for x in gradients)
    # What is left out may be anything.
    hidden_bk = ~keep_bk[:, :, None, None, None]
    other = [inputs[0], *(jnp.where(hidden_bk, 7 * x[::-1] + 1, x) for x in inputs[1:])]
    np.testing.assert_array_equal(run(other, keep_bk)[0], out)


def test_cudnn_refuses_it():
    layout = SetLayout.training(3)
    with pytest.raises(UserError, match=r"'prefix_cudnn' can't leave out single images .*attention_backend='prefix'"):
        BACKENDS["prefix_cudnn"](*qkv(layout, jnp.bfloat16), layout, jnp.asarray(keep(layout)))


@pytest.mark.parametrize("backend", ["dense", "prefix"])
def test_a_set_without_an_image_is_the_set_that_never_had_it(backend):
    config = UNetConfig(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        layers_per_block=1,
        num_attention_heads=(2,),
        norm_num_groups=8,
        attention_backend=backend,
    )
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))
    params, rng = random_params(shapes), np.random.default_rng(0)
    clean, noised = (rng.standard_normal((2, n, 4, 4, 4)).astype(np.float32) for n in (2, 3))
    timestep = rng.integers(0, 1000, (2, 3), np.int32)

    @quick_jit
    def run(clean, keep_bm):
        def forward(clean):
            inputs = clean, noised, timestep, SetLayout.training(3)
            return denoise_sets(merge(graphdef, params), *inputs, clean_timestep=0, keep_bm=keep_bm)

        out, vjp = jax.vjp(forward, clean)
        return out, vjp(noised)[0]

    keep_bm = np.asarray([[False, True], [True, True]])
    out, gradient = run(clean, keep_bm)
    assert [bool(np.any(x)) for x in gradient[0]] == [False, True] and np.any(gradient[1, 0])
    replaced = clean.copy()
    replaced[0, 0] = clean[1, 1]
    np.testing.assert_array_equal(run(replaced, keep_bm)[0], out)
    whole, _ = run(clean, np.ones((2, 2), bool))
    np.testing.assert_allclose(out[1], whole[1], rtol=1e-5, atol=1e-5)
    shorter = SetLayout((1,), (2,))

    @quick_jit
    def run_shorter(clean):
        inputs = clean[:, 1:], noised[:, 2:], timestep[:, 2:], shorter
        return denoise_sets(merge(graphdef, params), *inputs, clean_timestep=0)

    np.testing.assert_allclose(out[0, 2], run_shorter(clean)[0, 0], rtol=1e-5, atol=1e-5)
