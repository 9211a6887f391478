"""The context cache is exact: what it gives is what a pass over context and image together gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit, random_params

from m2m_jax.attention.cached import plain
from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.diffusion.guidance import ALL, EVERYTHING, NONE, NOTHING, Branch
from m2m_jax.models.context_cache import append_image, denoise_next, empty_cache
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

NUM_SETS, SIZE, TOKENS, WIDTH = 3, 4, 5, 12
RNG = np.random.default_rng(0)
NOISED = RNG.standard_normal((NUM_SETS, 4, 4, 4)).astype(np.float32)
LATENTS = RNG.standard_normal((NUM_SETS, SIZE, 4, 4, 4)).astype(np.float32)
ENCODED = RNG.standard_normal((NUM_SETS, SIZE, TOKENS, WIDTH)).astype(np.float32)

BASE = {
    "block_out_channels": (16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 1,
    "num_attention_heads": (2, 4),
    "norm_num_groups": 8,
}
FORMS = {
    "M2M-Self": {},
    "M2M-Self, clean images alone, told their order": {"clean_sees": "itself", "order_embedding": True},
    "M2M-DINO, told their order": {"context_dim": WIDTH, "order_embedding": True},
}


@functools.cache
def programs(form: str):
    """(config, context, empty cache, append, denoise), compiled, at random weights without a zero."""
    config = UNetConfig(**BASE, **FORMS[form])
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))
    params = random_params(shapes)
    context = ENCODED if config.attends_to_encoded else LATENTS

    @functools.partial(quick_jit, static_argnames="slide")
    def append(cache, image, append_b, slide=False):
        return append_image(merge(graphdef, params), cache, image, clean_timestep=3, append_b=append_b, slide=slide)

    @functools.partial(quick_jit, static_argnames="guided")
    def denoise(cache, guided=False):
        branches = (EVERYTHING, NOTHING) if guided else (EVERYTHING,)
        return denoise_next(merge(graphdef, params), NOISED, jnp.float32(500), branches, cache=cache)

    image = jax.ShapeDtypeStruct(context[:, 0].shape, jnp.float32)
    empty = functools.partial(empty_cache, merge(graphdef, params), image)
    return config, graphdef, params, context, empty, append, denoise


def fill(form: str, counts, dtype="float32", size=SIZE, slide=False):
    """A cache with so many images of each set, and the program that denoises with it."""
    _, _, _, context, empty, append, denoise = programs(form)
    cache = empty(size, dtype)
    for i in range(max(counts)):
        cache = append(cache, context[:, i], np.asarray(counts) > i, slide=slide)
    return cache, denoise


def together(form: str, count: int) -> np.ndarray:
    """The uncached pass, as the paper's: context and image in one stack, at every step."""
    config, graphdef, params, context, *_ = programs(form)
    layout = SetLayout.sampling(count, config.clean_sees, config.attends_to_encoded)
    timestep = jnp.full((NUM_SETS, 1), 500)

    @quick_jit
    def run(context):
        return denoise_sets(merge(graphdef, params), context, NOISED[:, None], timestep, layout, clean_timestep=3)

    return np.asarray(run(context[:, :count] if count else None))[:, 0]


@pytest.mark.parametrize("form", FORMS)
def test_the_cached_pass_is_the_pass_over_all_images_for_sets_of_any_size(form):
    counts = (3, 0, 1)
    cache, denoise = fill(form, counts)
    conditional, unconditional = jnp.moveaxis(denoise(cache, guided=True), 1, 0)
    np.testing.assert_array_equal(cache.count_b, counts)
    none = together(form, 0)
    for b, count in enumerate(counts):
        np.testing.assert_allclose(conditional[b], together(form, count)[b], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(unconditional[b], none[b], rtol=1e-5, atol=1e-5)
        assert count == 0 or np.abs(conditional[b] - none[b]).max() > 0.05
    np.testing.assert_allclose(denoise(cache)[:, 0], conditional, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_compilation_serves_any_number_of_images(form):
    _, _, _, context, empty, append, denoise = programs(form)
    cache = empty(SIZE + 1, "float32")  # of its own: other tests have filled smaller ones
    before = append._cache_size(), denoise._cache_size()
    for i in range(SIZE):
        denoise(cache)
        cache = append(cache, context[:, i], np.ones(NUM_SETS, bool))
    assert (append._cache_size() - before[0], denoise._cache_size() - before[1]) == (1, 1)


def test_half_the_memory_costs_little():
    form = "M2M-Self"
    (exact, denoise), (half, _) = fill(form, (3, 3, 3)), fill(form, (3, 3, 3), "bfloat16")
    assert {x.dtype for x in half.k_bmshd.values()} == {jnp.dtype("bfloat16")}
    difference = np.abs(denoise(half) - denoise(exact)).max()
    assert 0 < difference < 0.02 * np.abs(denoise(exact)).max()


def test_a_full_cache_slides():
    """Where clean images see only themselves and are told no order, what stays is as if the oldest had never been."""
    form = "M2M-DINO, told their order"
    cache, denoise = fill(form, (4, 2, 1), size=2, slide=True)
    np.testing.assert_array_equal(cache.count_b, (2, 2, 1))
    np.testing.assert_array_equal(cache.position_b, (4, 2, 1))
    whole, denoise_whole = fill(form, (4, 2, 1))
    for name in ("k_bmshd", "v_bmshd"):
        for address, kept in getattr(cache, name).items():
            np.testing.assert_allclose(kept[0], getattr(whole, name)[address][0, 2:4], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(denoise(cache)[1:], denoise_whole(whole)[1:], rtol=1e-5, atol=1e-5)


def test_the_accumulated_softmax_is_the_softmax():
    """Of two sets with two rows each, which see some of five images, or nothing."""
    q, k, v = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 3, 2, 4), *[(2, 5, 6, 2, 4)] * 2))
    own = tuple(RNG.standard_normal((2, 6, 2, 4)).astype(np.float32) for _ in range(2))
    prefix = np.arange(5) < np.asarray([[5, 0], [2, 1]])[..., None]
    for sees in (prefix, RNG.random((2, 2, 5)) < 0.5, np.zeros((2, 2, 5), bool)):
        for extra in (None, own):
            out = jax.jit(plain)(30 * q, k, v, jnp.asarray(sees), extra)  # sharp
            for b, g in np.ndindex(2, 2):
                keys, values = (x[b, sees[b, g]].reshape(-1, 2, 4) for x in (k, v))
                if extra is not None:
                    keys, values = (np.concatenate([x, y[b]]) for x, y in ((keys, own[0]), (values, own[1])))
                logits = np.einsum("thd,shd->hts", 30 * q[b, g].astype(np.float64), keys) / 2
                weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e9))
                expected = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), values)
                np.testing.assert_allclose(out[b, g], expected if len(keys) else 0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "seen"),
    [
        (ALL, [[0, 1, 2], [], [0]]),
        (NONE, [[], [], []]),
        ((-2, None), [[1, 2], [], [0]]),
        ((None, -1), [[0, 1], [], []]),
        ((1, 9), [[1, 2], [], []]),
        ((0, 1), [[0], [], [0]]),
    ],
)
def test_bounds_are_those_of_a_slice(images, seen):
    cache, _ = fill("M2M-Self", (3, 0, 1))
    for levels in (1, 2):
        of_both = dataclasses.replace(cache, levels=levels, k_bmshd={"": np.zeros((3, 4 * levels, 1, 1, 1))})
        for level in range(levels):
            found = [np.flatnonzero(row).tolist() for row in of_both.sees_bm(Branch(images), level)]
            assert found == [[levels * image + level for image in of_set] for of_set in seen]
            assert seen == [list(range(count))[slice(*images)] for count in (3, 0, 1)]
