"""Splash attention: interpreted on the CPU against the dense reference, and lowered for TPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model_fixtures import quick_jit

from m2m_jax.attention import splash as module
from m2m_jax.attention.backends import dense
from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.splash import SetMask, block_size, splash
from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.training import sharding

interpreted = functools.partial(splash, interpret=True)

# (layout, tokens of a query image, tokens of a key image)
CASES = [
    (SetLayout.training(4), 128, 128),  # an image is a block
    (SetLayout.training(3), 256, 256),  # blocks of another size
    (SetLayout.training(4, "itself"), 64, 64),  # a block is two images, and the last block is padded
    (SetLayout.sampling(2), 64, 64),
    (SetLayout.training(4, encoded=True), 128, 130),  # M2M-DINO: blocks of keys across images
    (SetLayout((0, 1), (2, 2, 1, 0)), 48, 48),  # a position that stands more than once, blind images last
    (SetLayout((0, 5), (1, 0, 3), encoded=True), 16, 5),  # keys that nothing sees, a blind image in the middle
]
IDS = [f"{layout}-{t}-{s}" for layout, t, s in CASES]


def qkv(layout: SetLayout, t: int, s: int, *, b: int = 2, h: int = 2, d: int = 64, dtype=jnp.float32):
    """Random queries, keys and values."""
    rng = np.random.default_rng(0)
    shapes = [(b, layout.num_images, t, h, d)] + [(b, len(layout.clean), s, h, d)] * 2
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def shapes(*args, **options):
    return jax.eval_shape(lambda: qkv(*args, **options))


def outputs_and_gradients(backend, layout: SetLayout):
    """`(q, k, v) -> (output, gradients)`, of the product of the output with fixed noise."""

    def run(*inputs):
        out, vjp = jax.vjp(lambda *inputs: backend(*inputs, layout), *inputs)
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(out.shape), out.dtype)
        return out, vjp(cotangent)

    return run


def assert_near(found, expected, tolerance: float):
    """Within `tolerance` of the largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("layout", "t", "s"), CASES, ids=IDS)
def test_splash_equals_dense_in_values_and_gradients(layout, t, s):
    inputs = qkv(layout, t, s)
    found = quick_jit(outputs_and_gradients(interpreted, layout))(*inputs)
    assert_near(found, jax.jit(outputs_and_gradients(dense, layout))(*inputs), 1e-5)
    blind_q = ~layout.mask_qk().any(1)
    np.testing.assert_array_equal(np.asarray(found[0])[:, blind_q], 0)
    np.testing.assert_array_equal(np.asarray(found[1][0])[:, blind_q], 0)


def test_splash_in_bfloat16_is_near_dense_in_float32():
    layout = SetLayout.training(3)
    inputs = qkv(layout, 64, 64, d=40, dtype=jnp.bfloat16)
    found = quick_jit(outputs_and_gradients(interpreted, layout))(*inputs)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))
    inputs = tuple(x.astype(jnp.float32) for x in inputs)
    assert_near(found, jax.jit(outputs_and_gradients(dense, layout))(*inputs), 0.02)


@pytest.mark.parametrize(("layout", "t", "s"), CASES, ids=IDS)
def test_slices_of_the_mask_are_those_of_the_token_mask(layout, t, s):
    token_mask = layout.token_mask_qk(t, s)
    token_mask = token_mask[token_mask.any(1)]
    rows, columns = token_mask.shape
    mask = SetMask(layout, t, s, rows + 7, columns + 9)
    padded = np.pad(np.pad(token_mask, ((0, 7), (0, 0)), "edge"), ((0, 0), (0, 9)))
    np.testing.assert_array_equal(mask[:, :], padded)
    for start in range(0, rows, 50):
        where = slice(start, start + 20), slice(start // 2, start // 2 + 30)
        np.testing.assert_array_equal(mask[where], padded[where])
    assert mask.shape == padded.shape


def test_equal_masks_are_one_mask():
    masks = [SetMask(SetLayout.training(n), 4, 4, 8, 8) for n in (3, 3, 4)]
    assert masks[0] == masks[1] and hash(masks[0]) == hash(masks[1])
    assert masks[0] != masks[2]


@pytest.mark.parametrize(("tokens", "block"), [(4096, 512), (1024, 512), (768, 384), (256, 256), (64, 128), (257, 128)])
def test_blocks_divide_the_tokens_of_an_image_where_they_can(tokens, block):
    assert block_size(tokens) == block


@pytest.mark.parametrize("clean_sees", ["preceding", "itself"])
def test_25_images_take_work_where_the_mask_allows_and_nowhere_else(clean_sees):
    layout = SetLayout.training(25, clean_sees)
    kernel = module._kernel(layout, 1024, 1024, False)
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        assert info.partial_mask_blocks is None
        assert (info.block_mask > 0).sum() == layout.mask_qk().sum() * (1024 // 512) ** 2


def test_a_layout_without_clean_images_gives_zeros():
    layout = SetLayout.sampling(0)
    assert not np.any(interpreted(*qkv(layout, 16, 16), layout))


def test_what_the_kernel_cannot_express_is_refused():
    layout = SetLayout.training(2)
    with pytest.raises(UserError, match=r"float32 or bfloat16, not float16; .*model.attention_backend='prefix'"):
        splash(*qkv(layout, 16, 16, dtype=jnp.float16), layout)
    with pytest.raises(UserError, match=r"has 2 sets for 8 devices of the mesh; .*='prefix'"):
        sharding.traced_on(make_mesh(fsdp=2), splash)(*qkv(layout, 16, 16), layout)


def tpu_program(function, *inputs) -> str:
    """StableHLO for TPUs."""
    return jax.jit(function).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("t", "s", "d"), [(256, 256, 64), (64, 257, 40)])
def test_it_lowers_for_tpus_to_three_kernels(dtype, t, s, d):
    layout = SetLayout.training(3, encoded=t != s)
    inputs = shapes(layout, t, s, d=d, dtype=dtype)
    assert tpu_program(lambda *inputs: splash(*inputs, layout), *inputs).count("tpu_custom_call") == 1
    assert tpu_program(outputs_and_gradients(splash, layout), *inputs).count("tpu_custom_call") == 3


def make_mesh(**axes):
    config = default_config().mesh
    config.update(axes)
    return sharding.make_mesh(config)


# (axes, heads, tokens of an image, what splits heads, what splits tokens, sets x heads x tokens of the two images that
# see any, a device)
SPLIT = [
    ({"fsdp": 2}, 1, 256, None, None, "2x1x512"),
    ({"tensor": 2}, 4, 256, "tensor", None, "4x2x512"),
    ({"tensor": 2, "context": 2}, 4, 256, ("tensor", "context"), None, "8x1x512"),
    ({"tensor": 2, "context": 2}, 2, 256, "tensor", "context", "8x1x256"),
    ({"tensor": 2, "context": 2}, 1, 256, None, ("context", "tensor"), "8x1x128"),
    ({"context": 2}, 1, 255, None, None, "4x1x512"),  # both compute all
]


@pytest.mark.parametrize(("axes", "h", "t", "heads", "tokens", "share"), SPLIT)
def test_each_device_of_a_mesh_runs_it_for_its_own_sets_heads_and_tokens(axes, h, t, heads, tokens, share):
    mesh, layout = make_mesh(**axes), SetLayout.training(3, encoded=True)
    inputs = qkv(layout, t, 48, b=16, h=h)
    expected = jax.jit(outputs_and_gradients(dense, layout))(*inputs)
    run = jax.jit(sharding.traced_on(mesh, outputs_and_gradients(interpreted, layout)))
    of_queries, of_keys = (
        NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, None, axes, heads)) for axes in (tokens, None)
    )
    placed = jax.device_put(inputs, (of_queries, of_keys, of_keys))
    found = run(*placed)
    assert_near(found, expected, 1e-5)
    out, gradients = found
    for x, where in ((out, of_queries), *zip(gradients, (of_queries, of_keys, of_keys), strict=True)):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    program = run.lower(*placed).compile().as_text()
    # Of what lies on several devices alike, the gradients are sums: of keys and values, where tokens are split.
    divided = {"tensor", "context"} & set(np.ravel(heads))
    assert ("all-reduce(" in program) == bool({"tensor", "context"} & axes.keys() - divided)
    assert "all-gather" not in program

    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in placed]
    text = tpu_program(sharding.traced_on(mesh, outputs_and_gradients(splash, layout)), *abstract)
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert len(calls) == 3
    assert all(f"tensor<{share}x" in call for call in calls)
