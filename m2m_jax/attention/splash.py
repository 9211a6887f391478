"""Image-set attention by JAX's splash attention, a TPU kernel in Pallas that visits the blocks of a mask that are seen.

The images of a set lie end to end, as one sequence of queries and one of keys. Where the tokens of an image are a
multiple of a block, every block is seen whole or not visited: no work on what is forbidden, no mask read. Else
blocks lie across images (64 tokens an image; DINOv2's 257), and those of them that are seen in part read their mask.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_infos

from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.mesh import split_over_mesh
from m2m_jax.core.errors import UserError

LANES = 128  # blocks are multiples of a TPU register's width
MAX_BLOCK = 512  # tokens; the float32 weights of one block take 1 MiB of the 16 that a kernel has
DTYPES = (jnp.float32, jnp.bfloat16)
CHECKPOINT_NAME = "attention"  # of what attention gives and its gradient needs, to the policies of recomputation


def splash(
    q_bqthd: jax.Array,
    k_bkshd: jax.Array,
    v_bkshd: jax.Array,
    layout: SetLayout,
    keep_bk: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend as `backends.Backend` says. Lowers for TPU alone, forward and backward, on any machine.

    Args:
      keep_bk: images that nobody sees are another segment than the queries. A query that sees none gets their mean.
      interpret: run the kernel as plain XLA, on any platform and slowly, to test it.

    Raises:
      UserError: another dtype than float32 and bfloat16; or as `split_over_mesh`.
    """
    if q_bqthd.dtype not in DTYPES:
        raise UserError(
            f"attention backend 'splash' computes in float32 or bfloat16, not {q_bqthd.dtype}; "
            "set model.dtype to one of them, or model.attention_backend='prefix'"
        )
    run = functools.partial(_of_one_device, layout=layout, interpret=interpret)
    return split_over_mesh(run, "splash", q_bqthd, k_bkshd, v_bkshd, keep_bk)


def _of_one_device(
    q_bqthd: jax.Array,
    k_bkshd: jax.Array,
    v_bkshd: jax.Array,
    keep_bk: jax.Array | None = None,
    *,
    layout: SetLayout,
    interpret: bool,
) -> jax.Array:
    b, _, t, h, d = q_bqthd.shape
    runs = _runs(layout)
    seeing = [(start, stop) for start, stop, sees in runs if sees]
    if not seeing:
        return jnp.zeros_like(q_bqthd)

    # Rows of the mask without a key are undefined in the kernel: it is not given them.
    q_bqthd = jnp.concatenate([q_bqthd[:, start:stop] for start, stop in seeing], axis=1) * d**-0.5
    num_queries = q_bqthd.shape[1]
    q_bhtd, k_bhtd, v_bhtd = _sequence(q_bqthd), _sequence(k_bkshd), _sequence(v_bkshd)
    segments = []
    if keep_bk is not None:
        segments.append(_segments(keep_bk, k_bkshd.shape[2], q_bhtd.shape[2], k_bhtd.shape[2]))
    attend: Any = jax.vmap(_kernel(layout, t, k_bkshd.shape[2], interpret))
    out_bhtd = attend(q_bhtd, k_bhtd, v_bhtd, *segments)
    out_bqthd = out_bhtd[:, :, : num_queries * t].reshape(b, h, num_queries, t, d).transpose(0, 2, 3, 1, 4)

    pieces, used = [], 0
    for start, stop, sees in runs:
        if sees:
            pieces.append(out_bqthd[:, used : used + stop - start])
            used += stop - start
        else:
            pieces.append(jnp.zeros((b, stop - start, t, h, d), out_bqthd.dtype))
    return jnp.concatenate(pieces, axis=1)


@dataclasses.dataclass(frozen=True)
class SetMask(masks.Mask):
    """The layout's mask between images that lie end to end. A slice is computed when it is asked for.

    Attributes:
      rows_per_image: queries an image, of the images of the stack that see any key.
      columns_per_image: keys an image.
      num_rows: of all images, and padding, which sees what the last image sees: blocks stay whole, and nothing reads
        the outputs.
      num_columns: of all images, and padding, which nothing sees.
    """

    layout: SetLayout
    rows_per_image: int
    columns_per_image: int
    num_rows: int
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_columns

    @functools.cached_property
    def _mask_qk(self) -> np.ndarray:
        """Of the images that see any, with a last column for the padding."""
        mask_qk = self.layout.mask_qk()
        return np.pad(mask_qk[mask_qk.any(1)], ((0, 0), (0, 1)))

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        row, column = (np.arange(*part.indices(size)) for part, size in zip(index, self.shape, strict=True))
        last_query, padding = (size - 1 for size in self._mask_qk.shape)
        query_image = np.minimum(row // self.rows_per_image, last_query)
        key_image = np.minimum(column // self.columns_per_image, padding)
        return self._mask_qk[query_image[:, None], key_image[None, :]]


def block_size(tokens: int) -> int:
    """Return the largest block that divides the tokens of an image; the smallest there is where none does."""
    return next((n for n in range(MAX_BLOCK, LANES, -LANES) if tokens % n == 0), LANES)


def visited_pairs(layout: SetLayout, t: int, s: int) -> int:
    """Count the pairs of a query's and a key's token in the blocks that the kernel computes, of one set and head."""
    block_mask: Any = _kernel(layout, t, s, False).fwd_mask_info.block_mask
    return int(np.count_nonzero(block_mask)) * block_size(t) * block_size(s)


@functools.lru_cache(maxsize=256)
def _kernel(layout: SetLayout, t: int, s: int, interpret: bool) -> kernels.SplashAttentionKernel:
    """Return the kernel for one set, (q [h, t, d], k [h, s, d], v) -> [h, t, d], with its mask by blocks in NumPy."""
    block_q, block_kv = block_size(t), block_size(s)
    # The mask changes from one unit of tokens to the next at most. With units in the place of tokens it is small
    # enough to be looked at block by block: where blocks are not seen in part, a block is one unit.
    unit_q, unit_kv = math.gcd(t, block_q), math.gcd(s, block_kv)
    num_queries, num_keys = int(layout.mask_qk().any(1).sum()), len(layout.clean)
    num_rows, num_columns = _padded(num_queries * t, block_q), _padded(num_keys * s, block_kv)
    mask = SetMask(layout, t // unit_q, s // unit_kv, num_rows // unit_q, num_columns // unit_kv)

    def mask_info(process, *units: int) -> mask_infos.MaskInfo:
        block_shape = block_q // unit_q, block_kv // unit_kv
        info, _ = process(masks.MultiHeadMask([mask]), block_shape, head_shards=1, q_seq_shards=1)
        if info.partial_mask_blocks is None:
            return info
        return info._replace(partial_mask_blocks=info.partial_mask_blocks.repeat(units[0], 1).repeat(units[1], 2))

    forward = mask_info(mask_infos.process_mask, unit_q, unit_kv)
    return kernels.SplashAttentionKernel(
        forward,
        forward,  # of the gradient of the queries, whose blocks are the same
        mask_info(mask_infos.process_mask_dkv, unit_kv, unit_q),  # transposed
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=CHECKPOINT_NAME,
        mask_function=None,
        interpret=interpret,
    )


def _runs(layout: SetLayout) -> list[tuple[int, int, bool]]:
    """Return [(first image of the stack, one past the last, whether they see any key)], in order, as long as can be."""
    sees_q = np.any(layout.mask_qk(), axis=1)
    bounds = [0, *(np.flatnonzero(np.diff(sees_q)) + 1).tolist(), layout.num_images]
    return [(start, stop, bool(sees_q[start])) for start, stop in itertools.pairwise(bounds)]


def _padded(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _segments(keep_bk: jax.Array, s: int, num_rows: int, num_columns: int) -> kernels.SegmentIds:
    """Return ids by token, of sequences with padding: queries are 0, keys are 0 where they are seen.

    s: tokens of a key image. What sees what of padding does not matter: nothing reads it.
    """
    hidden_bt = jnp.repeat(~keep_bk, s, axis=1).astype(jnp.int32)
    hidden_bt = jnp.pad(hidden_bt, ((0, 0), (0, num_columns - hidden_bt.shape[1])))
    return kernels.SegmentIds(jnp.zeros((keep_bk.shape[0], num_rows), jnp.int32), hidden_bt)


def _sequence(x_bnthd: jax.Array) -> jax.Array:
    """Return [b, h, tokens, d]: images end to end, and zeros up to a multiple of a block."""
    x_bhtd = jax.lax.collapse(x_bnthd, 1, 3).transpose(0, 2, 1, 3)
    tokens = x_bhtd.shape[2]
    padding = _padded(tokens, block_size(x_bnthd.shape[2])) - tokens
    return jnp.pad(x_bhtd, ((0, 0), (0, 0), (0, padding), (0, 0)))
