"""The executions of image-set attention. Each gets its mask from `SetLayout.mask_qk`, and none falls back silently."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from m2m_jax.attention.cudnn import prefix_cudnn
from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.plain import Keep, Keys, Queries, dense, prefix
from m2m_jax.attention.splash import splash
from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry


@dataclasses.dataclass(frozen=True)
class Backend:
    """An execution of image-set attention, and what it needs.

    Attributes:
      function: takes `q_bqthd` (queries of the images of the stack, t tokens an image), `k_bkshd`, `v_bkshd` (of the
        clean images, s tokens an image) and the `SetLayout`; where `takes_keep`, `keep_bk`, too. Returns
        [b, q, t, h, d], zeros for an image that sees none by the layout.
      platform: the platform whose kernel it is, as `jax.default_backend` says it; None: plain XLA, which runs anywhere.
      dtypes: that it computes in.
      takes_keep: whether it takes a mask that is data.

    Example, a new one:
        BACKENDS.register("ring")(Backend(ring, platform="tpu", takes_keep=False))
    """

    function: Callable[..., jax.Array]
    platform: str | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    takes_keep: bool = True

    def __post_init__(self):
        object.__setattr__(self, "__doc__", self.function.__doc__)  # what --help says of it

    def __call__(
        self, q_bqthd: Queries, k_bkshd: Keys, v_bkshd: Keys, layout: SetLayout, keep_bk: Keep = None
    ) -> Queries:
        """Attend under the layout's mask.

        Args:
          keep_bk: bool; no image of the set sees a clean one marked False.

        Returns:
          [b, q, t, h, d], zeros for an image that sees none.

        Raises:
          UserError: it takes no `keep_bk`, or as the function.
        """
        if keep_bk is None:
            return self.function(q_bqthd, k_bkshd, v_bkshd, layout)
        if not self.takes_keep:
            name = next((name for name, backend in BACKENDS.items() if backend is self), "?")
            raise UserError(
                f"attention backend '{name}' can't leave out single images of the context; "
                "set model.attention_backend='prefix'"
            )
        out_bqthd = self.function(q_bqthd, k_bkshd, v_bkshd, layout, keep_bk)
        sees_bq = jnp.any(layout.mask_qk()[None] & keep_bk[:, None, :], axis=-1)
        return jnp.where(sees_bq[:, :, None, None, None], out_bqthd, jnp.zeros_like(out_bqthd))


BACKENDS = Registry[Backend]("attention backend")
BACKENDS.register("dense")(Backend(dense))
BACKENDS.register("prefix")(Backend(prefix))
BACKENDS.register("prefix_cudnn")(Backend(prefix_cudnn, platform="gpu", dtypes=("bfloat16",), takes_keep=False))
BACKENDS.register("splash")(Backend(splash, platform="tpu"))


def resolve(name: str, platform: str, dtype: str) -> str:
    """Return the name of the backend that `model.attention_backend` stands for, where "auto" is allowed.

    "auto" is the first kernel for the platform that computes in that dtype; where there is none, prefix.

    Args:
      platform: "cpu", "gpu" or "tpu", as `jax.default_backend` says, or of the devices that are compiled for.
      dtype: `model.dtype`.

    Raises:
      UserError: there is no such backend, it is a kernel for another platform, or does not compute in that dtype.
    """
    if name == "auto":
        kernels = (n for n, backend in BACKENDS.items() if backend.platform == platform and dtype in backend.dtypes)
        return next(kernels, "prefix")
    backend = BACKENDS.choose(name)
    if backend.platform not in (None, platform):
        raise UserError(
            f"model.attention_backend='{name}' is a kernel for {backend.platform}, and this is a {platform}; "
            "set it to 'auto'"
        )
    if dtype not in backend.dtypes:
        raise UserError(
            f"model.attention_backend='{name}' needs model.dtype='{backend.dtypes[0]}'; or set it to 'auto'"
        )
    return name
