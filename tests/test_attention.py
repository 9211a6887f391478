"""The mask of image-set attention against hand-written tables, and its executions against one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import RUN_HERE

from m2m_jax.attention.backends import BACKENDS, resolve
from m2m_jax.attention.cudnn import prefix_cudnn
from m2m_jax.attention.layout import CLEAN_SEES, SetLayout, allowed
from m2m_jax.attention.plain import dense, prefix
from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.training import sharding

# A row for each image of the stack [clean; noised], a column for each clean image.
TABLES = [
    (
        SetLayout.training(4),
        [
            "1..",  # clean 0
            "11.",
            "111",
            "...",  # noised 0
            "1..",
            "11.",
            "111",
        ],
    ),
    (
        SetLayout.training(4, "itself"),
        [
            "1..",  # clean 0
            ".1.",
            "..1",
            "...",  # noised 0
            "1..",
            "11.",
            "111",
        ],
    ),
    (
        SetLayout.sampling(3),
        [
            "1..",  # clean 0
            "11.",
            "111",
            "111",  # noised 3
        ],
    ),
    (
        SetLayout.sampling(3, "itself"),
        [
            "1..",  # clean 0
            ".1.",
            "..1",
            "111",  # noised 3
        ],
    ),
    (
        SetLayout(clean=(0, 1), noised=(2, 2, 1, 0)),  # evaluation: a position stands more than once
        [
            "1.",  # clean 0
            "11",
            "11",  # noised 2
            "11",  # noised 2
            "1.",  # noised 1
            "..",  # noised 0
        ],
    ),
    (
        SetLayout(clean=(0, 1), noised=(2, 2, 1, 0), clean_sees="itself"),
        [
            "1.",  # clean 0
            ".1",
            "11",  # noised 2
            "11",  # noised 2
            "1.",  # noised 1
            "..",  # noised 0
        ],
    ),
    (
        SetLayout.training(3, encoded=True),  # M2M-DINO: no clean image in the stack
        [
            "..",  # noised 0
            "1.",
            "11",
        ],
    ),
]

LAYOUTS = [
    *[SetLayout.training(n, clean_sees) for n in (2, 4) for clean_sees in CLEAN_SEES],
    *[SetLayout.sampling(3, clean_sees) for clean_sees in CLEAN_SEES],
    SetLayout.training(1),  # no clean image
    SetLayout((), (0, 1, 5)),
    SetLayout((0, 1), (1, 0, 2, 2, 1)),  # positions that stand more than once, in any order
    SetLayout((0, 2, 5), (0, 3, 9, 4)),  # gaps
    SetLayout((0, 2, 5), (0, 3, 9, 4), "itself"),
    SetLayout((2, 3), (1, 0)),  # every noised image without a key
    SetLayout.training(4, encoded=True),  # keys of another number of tokens
    SetLayout((0, 2, 5), (0, 3, 9, 4), encoded=True),
]
NOT_CONTIGUOUS = SetLayout(clean=(0, 2, 1), noised=(2,))


def qkv(layout: SetLayout, dtype=np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values: two sets, three tokens an image (two by an encoder), two heads of four channels."""
    rng = np.random.default_rng(len(layout.clean))
    keys = (2, len(layout.clean), 2 if layout.encoded else 3, 2, 4)
    shapes = [(2, layout.num_images, 3, 2, 4), keys, keys]
    return tuple(jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes)


def outputs_and_gradients(backend: str, layout: SetLayout) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and the gradients of its product with fixed noise with respect to queries, keys and values."""

    @jax.jit
    def run(inputs):
        out, vjp = jax.vjp(lambda *args: BACKENDS[backend](*args, layout), *inputs)
        cotangent = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
        return out, vjp(jnp.asarray(cotangent))

    return run(qkv(layout))


def by_definition(q_bqthd, k_bkshd, v_bkshd, layout: SetLayout, mask_qk=None) -> np.ndarray:
    """Image-set attention written out: each image, over the images that its row of the mask names. In float64."""
    mask_qk = layout.mask_qk() if mask_qk is None else mask_qk
    q_bqthd, k_bkshd, v_bkshd = (np.asarray(x, np.float64) for x in (q_bqthd, k_bkshd, v_bkshd))
    out_bqthd = np.zeros(q_bqthd.shape)
    for query, row_k in enumerate(mask_qk):
        if row_k.any():
            logits_bhtks = np.einsum("bthd,bkshd->bhtks", q_bqthd[:, query], k_bkshd[:, row_k]) / 2
            weights_bhtks = np.exp(logits_bhtks - logits_bhtks.max((3, 4), keepdims=True))
            weights_bhtks /= weights_bhtks.sum((3, 4), keepdims=True)
            out_bqthd[:, query] = np.einsum("bhtks,bkshd->bthd", weights_bhtks, v_bkshd[:, row_k])
    return out_bqthd


@pytest.mark.parametrize(("layout", "rows"), TABLES, ids=lambda x: str(x) if isinstance(x, SetLayout) else "")
def test_masks_are_those_of_the_tables(layout, rows):
    table_qk = np.asarray([[cell == "1" for cell in row] for row in rows])
    np.testing.assert_array_equal(layout.mask_qk(), table_qk)
    np.testing.assert_array_equal(layout.token_mask_qk(3, 2), np.kron(table_qk, np.ones((3, 2), bool)))


def test_a_layout_without_clean_images_has_a_mask_without_columns():
    assert SetLayout.sampling(0).mask_qk().shape == (1, 0)
    assert SetLayout.training(1).mask_qk().shape == (1, 0)


@pytest.mark.parametrize("clean_sees", CLEAN_SEES)
def test_the_predicate_takes_scalars_numpy_and_jax(clean_sees):
    layout = SetLayout.training(5, clean_sees)
    is_noised = np.arange(layout.num_images) >= len(layout.clean)
    query_position, key_position = np.asarray(layout.clean + layout.noised), np.asarray(layout.clean)
    by_scalars = [
        [allowed(bool(n), int(q), int(k), clean_sees) for k in key_position]
        for n, q in zip(is_noised, query_position, strict=True)
    ]
    assert all(type(x) is bool for row in by_scalars for x in row)
    np.testing.assert_array_equal(layout.mask_qk(), by_scalars)
    broadcast = is_noised[:, None], query_position[:, None], key_position[None, :]
    by_jax = jax.jit(lambda *args: allowed(*args, clean_sees))(*broadcast)
    assert by_jax.dtype == bool
    np.testing.assert_array_equal(layout.mask_qk(), by_jax)


def test_an_unknown_way_for_clean_images_to_see_is_refused():
    with pytest.raises(ValueError, match="clean_sees must be one of"):
        SetLayout((0,), (1,), "everything")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prefix_equals_dense_in_values_and_gradients(layout):
    reference, reference_gradients = outputs_and_gradients("dense", layout)
    out, gradients = outputs_and_gradients("prefix", layout)
    np.testing.assert_allclose(reference, by_definition(*qkv(layout), layout), rtol=0, atol=1e-5)
    np.testing.assert_allclose(out, reference, rtol=0, atol=1e-5)
    for name, a, b in zip("qkv", gradients, reference_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize("layout", [SetLayout.training(3), SetLayout((2, 3), (1, 0)), SetLayout.training(1)], ids=str)
def test_an_image_that_sees_no_key_gets_zeros_and_finite_gradients(backend, layout):
    out_bqthd, gradients = outputs_and_gradients(backend, layout)
    blind_q = ~layout.mask_qk().any(1)
    assert blind_q.any()
    np.testing.assert_array_equal(out_bqthd[:, blind_q], 0)
    np.testing.assert_array_equal(gradients[0][:, blind_q], 0)
    assert all(np.isfinite(x).all() for x in gradients)
    assert all(np.any(out_bqthd[:, i]) for i in np.flatnonzero(~blind_q))


@pytest.mark.parametrize("backend", RUN_HERE)
def test_the_output_has_the_dtype_of_the_input(backend):
    layout = SetLayout.training(2)
    out = BACKENDS[backend](*qkv(layout, jnp.bfloat16), layout)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_definition(*qkv(layout), layout), rtol=0, atol=0.05)


def test_prefix_refuses_a_mask_that_is_not_contiguous():
    with pytest.raises(UserError, match=r"image 2 of .* sees \[0, 2\]; use model.attention_backend='dense'"):
        prefix(*qkv(NOT_CONTIGUOUS), NOT_CONTIGUOUS)


def test_dense_takes_a_mask_that_is_not_contiguous():
    out, _ = outputs_and_gradients("dense", NOT_CONTIGUOUS)
    np.testing.assert_allclose(out, by_definition(*qkv(NOT_CONTIGUOUS), NOT_CONTIGUOUS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "expected"),
    [
        ("auto", "cpu", "float32", "prefix"),
        ("auto", "cpu", "bfloat16", "prefix"),
        ("auto", "gpu", "float32", "prefix"),
        ("auto", "gpu", "bfloat16", "prefix_cudnn"),
        ("auto", "tpu", "float32", "splash"),
        ("auto", "tpu", "bfloat16", "splash"),
        ("dense", "tpu", "float32", "dense"),
        ("prefix", "gpu", "bfloat16", "prefix"),
        ("prefix_cudnn", "gpu", "bfloat16", "prefix_cudnn"),
        ("splash", "tpu", "float32", "splash"),
    ],
)
def test_auto_is_what_the_platform_runs_and_a_name_is_itself(name, platform, dtype, expected):
    assert resolve(name, platform, dtype) == expected


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "message"),
    [
        ("splash", "cpu", "float32", "'splash' is a kernel for tpu, and this is a cpu; set it to 'auto'"),
        ("prefix_cudnn", "tpu", "bfloat16", "'prefix_cudnn' is a kernel for gpu, and this is a tpu"),
        ("prefix_cudnn", "gpu", "float32", "'prefix_cudnn' needs model.dtype='bfloat16'; or set it to 'auto'"),
    ],
)
def test_a_kernel_of_another_platform_or_dtype_is_refused(name, platform, dtype, message):
    with pytest.raises(UserError, match=message):
        resolve(name, platform, dtype)


def test_cudnn_refuses_float32_and_what_it_cannot_run():
    layout = SetLayout.training(2)
    with pytest.raises(UserError, match=r"computes in 16 bits, not in float32; set model.dtype='bfloat16'"):
        prefix_cudnn(*qkv(layout), layout)
    with pytest.raises(UserError, match=r"can't attend from \(2, 6, 2, 4\).* Set model.attention_backend='prefix'"):
        prefix_cudnn(*qkv(layout, jnp.bfloat16), layout)  # there is no cuDNN here


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2, "context": 2}, {"data": 2, "context": 4}])
def test_prefix_cudnn_gives_its_kernel_what_the_reference_attends_to(axes, monkeypatch):
    """Values and gradients, with XLA's attention in the place of cuDNN's."""
    attention = jax.nn.dot_product_attention

    def by_xla(*qkv, implementation):
        assert implementation == "cudnn"
        return attention(*qkv, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    layout, rng = SetLayout.training(3), np.random.default_rng(0)
    shapes = [(2, images, 4, 2, 8) for images in (layout.num_images, len(layout.clean), len(layout.clean))]
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]

    def outputs_and_gradients(backend, *inputs):
        out, vjp = jax.vjp(lambda *qkv: backend(*qkv, layout).astype(jnp.float32), *inputs)
        return out, vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    found, placed = functools.partial(outputs_and_gradients, prefix_cudnn), inputs
    if axes:
        config = default_config().mesh
        config.update(axes)
        mesh = sharding.make_mesh(config)
        found, placed = sharding.traced_on(mesh, found), jax.device_put(inputs, sharding.replicated(mesh))
    expected = jax.jit(functools.partial(outputs_and_gradients, dense))(*inputs)
    with jax.numpy_dtype_promotion("standard"):  # as XLA's own attention wants it
        found = jax.jit(found)(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 0.02 * np.abs(b).max()  # in bfloat16


@pytest.mark.parametrize(
    ("axes", "h", "queries", "keys"),
    [
        ({}, 4, "2x128x4x64", "2x64x4x64"),
        ({"data": 2, "tensor": 2, "context": 2}, 4, "1x128x1x64", "1x64x1x64"),
        ({"data": 2, "context": 4}, 5, "1x32x5x64", "1x64x5x64"),
    ],
)
def test_prefix_cudnn_lowers_to_its_kernels(axes, h, queries, keys, monkeypatch):
    """A call for each run of keys that is seen, forward and backward. Lowered, not compiled: that takes a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    layout = SetLayout.training(3)
    q_bqthd = jax.ShapeDtypeStruct((2, layout.num_images, 64, h, 64), jnp.bfloat16)
    k_bkshd = jax.ShapeDtypeStruct((2, len(layout.clean), 64, h, 64), jnp.bfloat16)

    def loss(q_bqthd, k_bkshd, v_bkshd):
        return prefix_cudnn(q_bqthd, k_bkshd, v_bkshd, layout).astype(jnp.float32).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    if axes:
        config = default_config().mesh
        config.update(axes)
        gradient = sharding.traced_on(sharding.make_mesh(config), gradient)
    text = jax.jit(gradient).trace(q_bqthd, k_bkshd, k_bkshd).lower(lowering_platforms=("cuda",)).as_text()
    # Under a mesh each call is a device's own, of its set, heads and tokens: cuDNN's partitioner refuses to split rows.
    assert "CustomSPMDPartitioning" not in text
    assert text.count("__cudnn$fmhaSoftmax(") == 2
    assert text.count("__cudnn$fmhaSoftmaxBackward(") == 2
    # Clean 0 and noised 1 share a call, for they see clean 0 alone.
    assert f": (tensor<{queries}xbf16>, tensor<{keys}xbf16>, tensor<{keys}xbf16>)" in text
