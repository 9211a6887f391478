"""Executions of image-set attention. Each gets its mask from `SetLayout.mask_qk`, and none falls back silently.

All take `q_bqthd` (queries of the images of the stack, t tokens an image) and `k_bkshd`, `v_bkshd` (of the clean
images, s tokens an image), and return `[b, q, t, h, d]`. A query image that sees no key gets zeros.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.mesh import split_over_mesh
from m2m_jax.attention.splash import splash
from m2m_jax.core.errors import UserError

# [b, t, h, d], keys [b, s, h, d], values -> [b, t, h, d], without a mask.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attend(q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask_qk: np.ndarray | None = None) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax. `mask_qk`: bool over tokens, shared by the batch."""
    scale = q_bthd.shape[-1] ** -0.5
    logits_bhqk = jnp.einsum("bqhd,bkhd->bhqk", q_bthd * scale, k_bthd, preferred_element_type=jnp.float32)
    if mask_qk is not None:
        logits_bhqk = jnp.where(mask_qk[None, None], logits_bhqk, jnp.finfo(jnp.float32).min)
    weights_bhqk = jax.nn.softmax(logits_bhqk, axis=-1).astype(v_bthd.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights_bhqk, v_bthd)


def dense(q_bqthd: jax.Array, k_bkshd: jax.Array, v_bkshd: jax.Array, layout: SetLayout) -> jax.Array:
    """The reference: one attention over all tokens under the dense mask. Works on forbidden blocks too."""
    b, q, t, h, d = q_bqthd.shape
    flat = (jax.lax.collapse(x, 1, 3) for x in (q_bqthd, k_bkshd, v_bkshd))
    out_bqthd = attend(*flat, mask_qk=layout.token_mask_qk(t, k_bkshd.shape[2])).reshape(b, q, t, h, d)
    sees_something_q = layout.mask_qk().any(1)
    return jnp.where(sees_something_q[None, :, None, None, None], out_bqthd, jnp.zeros_like(out_bqthd))


def prefix(q_bqthd: jax.Array, k_bkshd: jax.Array, v_bkshd: jax.Array, layout: SetLayout) -> jax.Array:
    """Plain attention calls over slices of the keys: no work on forbidden blocks, no mask in memory.

    Raises:
      UserError: a row of the mask is not one contiguous run of key images.
    """
    return _over_slices(attend, q_bqthd, k_bkshd, v_bkshd, layout)


def prefix_cudnn(q_bqthd: jax.Array, k_bkshd: jax.Array, v_bkshd: jax.Array, layout: SetLayout) -> jax.Array:
    """`prefix` with cuDNN's flash attention in each call, which keeps no logits in memory. NVIDIA GPUs, 16 bits.

    cuDNN is never given a mask, with which it is slow or fails: what a call is given, all of its queries see.

    Raises:
      UserError: as `prefix` and `split_over_mesh`; or cuDNN is not there, or takes no such dtype or width of a head.
    """
    # Left to cuDNN's own partitioner, a mesh that splits rows (context) does not compile.
    run = functools.partial(_over_slices, _attend_by_cudnn, layout=layout)
    return split_over_mesh(run, "prefix_cudnn", q_bqthd, k_bkshd, v_bkshd)


def _attend_by_cudnn(q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array) -> jax.Array:
    if q_bthd.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention backend 'prefix_cudnn' computes in 16 bits, not in {q_bthd.dtype}; "
            "set model.dtype='bfloat16' or model.attention_backend='prefix'"
        )
    try:
        return jax.nn.dot_product_attention(q_bthd, k_bthd, v_bthd, implementation="cudnn")
    except (NotImplementedError, RuntimeError) as error:  # that it refuses a shape, or that there is none
        raise UserError(
            f"attention backend 'prefix_cudnn' can't attend from {q_bthd.shape} to {k_bthd.shape}: {error} "
            "Set model.attention_backend='prefix'"
        ) from error


def _over_slices(
    attend: Attend, q_bqthd: jax.Array, k_bkshd: jax.Array, v_bkshd: jax.Array, layout: SetLayout
) -> jax.Array:
    """A call of `attend` for each run of key images that is seen.

    Query images that see the same run of key images share one call: with `clean_sees="preceding"` clean i and
    noised i + 1 do, so a training set of n images takes n - 1 calls.
    """
    b, _, t, h, d = q_bqthd.shape
    groups = _contiguous_runs(layout)
    out_q: list[jax.Array | None] = [None] * layout.num_images
    for (start, stop), queries in groups.items():
        if start == stop:
            shares = [jnp.zeros((b, t, h, d), v_bkshd.dtype)] * len(queries)
        else:
            q_bthd = jnp.concatenate([q_bqthd[:, i] for i in queries], axis=1)
            keys, values = (jax.lax.collapse(x[:, start:stop], 1, 3) for x in (k_bkshd, v_bkshd))
            shares = jnp.split(attend(q_bthd, keys, values), len(queries), axis=1)
        for i, share in zip(queries, shares, strict=True):
            out_q[i] = share
    return jnp.stack(out_q, axis=1)


def _contiguous_runs(layout: SetLayout) -> dict[tuple[int, int], list[int]]:
    """{(first key image, one past the last): query images that see exactly these}."""
    groups: dict[tuple[int, int], list[int]] = {}
    for query, row_k in enumerate(layout.mask_qk()):
        seen = np.flatnonzero(row_k)
        run = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0)
        if run[1] - run[0] != seen.size:
            raise UserError(
                "attention backends 'prefix' and 'prefix_cudnn' need each image to see one contiguous run of clean "
                f"images, but image {query} of {layout} sees {seen.tolist()}; use model.attention_backend='dense'"
            )
        groups.setdefault(run, []).append(query)
    return groups


Backend = Callable[[jax.Array, jax.Array, jax.Array, SetLayout], jax.Array]
BACKENDS: dict[str, Backend] = {"dense": dense, "prefix": prefix, "prefix_cudnn": prefix_cudnn, "splash": splash}
PLATFORMS = {"prefix_cudnn": "gpu", "splash": "tpu"}  # of kernels; the others are plain XLA and run anywhere


def resolve(name: str, platform: str, dtype: str) -> str:
    """The name of the backend that `model.attention_backend` stands for, where "auto" is allowed.

    "auto" is splash on a TPU. On a GPU it is prefix_cudnn in bfloat16; in float32, which cuDNN's attention does not
    take, it is prefix, as on a CPU.

    Args:
      platform: "cpu", "gpu" or "tpu", as `jax.default_backend` says, or of the devices that are compiled for.
      dtype: `model.dtype`.

    Raises:
      UserError: the backend is a kernel for another platform, or does not compute in that dtype.
    """
    if name == "auto":
        return {"tpu": "splash", "gpu": "prefix_cudnn" if dtype == "bfloat16" else "prefix"}.get(platform, "prefix")
    needed = PLATFORMS.get(name, platform)
    if needed != platform:
        raise UserError(
            f"model.attention_backend='{name}' is a kernel for {needed}, and this is a {platform}; set it to 'auto'"
        )
    if name == "prefix_cudnn" and dtype == "float32":
        raise UserError("model.attention_backend='prefix_cudnn' needs model.dtype='bfloat16'; or set it to 'auto'")
    return name
