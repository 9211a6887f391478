"""Is the context used? The denoising loss of one image of held-out sets under different contexts."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.errors import warn
from m2m_jax.core.keys import Domain, Stream, stream_key
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.unet import UNet
from m2m_jax.tasks.objective import Told, squared_error, stack_globals


def stratified_timesteps(schedule: NoiseSchedule, key: jax.Array, count: int) -> jax.Array:
    """Return one timestep in each of `count` equal strata, int32 [count].

    Batches differ far less in these than in independent draws.
    """
    fraction_k = (jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(key, (count,))) / count
    timestep_k = (fraction_k * schedule.num_train_timesteps).astype(jnp.int32)
    return jnp.minimum(timestep_k, schedule.num_train_timesteps - 1)  # the last fraction may round to 1


def warn_of_one_set(num_sets: int, split: str) -> None:
    """Warn, at the start, where the contexts to be compared are one."""
    if num_sets == 1:
        warn(f"the {split} split has one set: the context of another set (loss_other_context) is its own there")


def another(x_b: jax.Array) -> jax.Array:
    """Return for each row the nearest before it, round the batch, that differs from it, int32 [b].

    Where no row differs, it is the row itself.

    Args:
      x_b: [b] or [b, ...].
    """
    b = len(x_b)
    differs_bb = jnp.any((x_b[:, None] != x_b[None]).reshape(b, b, -1), axis=2)
    rows_b = jnp.arange(b)
    steps_back_bb = (rows_b[:, None] - rows_b[None]) % b
    return jnp.argmin(jnp.where(differs_bb, steps_back_bb, b + steps_back_bb), axis=1)


def context_errors(
    unet: UNet,
    schedule: NoiseSchedule,
    latents_bnhwc: jax.Array,
    context: jax.Array | None,
    *,
    record_b: jax.Array,
    seed: int,
    batch_index: jax.Array,
    clean_timestep: int,
    globals_bnc: Mapping[str, jax.Array] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Return the error of the last image of each set under every context, {name: [b]}.

    Noise and timestep are the same under each.

    Args:
      latents_bnhwc: scaled latents of held-out sets.
      context: the first n - 1 images of each set, as `denoise_sets` takes them.
      record_b: int32, which record each set is of: where records are few, a batch has some of them twice.
      seed, batch_index: noise and timesteps depend on these two alone, so every evaluation sees the same.
      clean_timestep: see `denoise_sets`.
      globals_bnc: {global embedding: values of all images of each set}. Those of a context go with it.

    Returns:
      loss_own_context: all n - 1 images before it as context.
      loss_other_context: the n - 1 images of another set in their place, of the nearest row before; its own, where the
        batch is of one set.
      loss_by_context_size/k: the first k images of its own set, k = 0 .. n - 1.
    """
    b, n, *image = latents_bnhwc.shape
    noise_key, timestep_key = (
        stream_key(Domain.EVALUATE, seed, batch_index, stream) for stream in (Stream.NOISE, Stream.TIMESTEP)
    )
    timestep_b = stratified_timesteps(schedule, timestep_key, b)
    noise_bhwc = jax.random.normal(noise_key, (b, *image))

    def errors(context, context_globals):
        # The same noised image at positions 0 .. n - 1 of one stack: position k sees k context images.
        repeated = (jnp.repeat(x[:, None], n, axis=1) for x in (latents_bnhwc[:, -1], noise_bhwc, timestep_b))
        layout = SetLayout.training(n, unet.config.clean_sees, unet.config.attends_to_encoded)
        of_last = {name: jnp.repeat(value_bnc[:, -1:], n, axis=1) for name, value_bnc in globals_bnc.items()}
        told = Told(layout, context, globals_bq=stack_globals(layout, context_globals, of_last))
        return squared_error(unet, schedule, told, *repeated, clean_timestep=clean_timestep)

    other_b = another(record_b)
    own_bn = errors(context, globals_bnc)
    other_bn = errors(*jax.tree.map(lambda x: x[other_b], (context, dict(globals_bnc))))
    by_size = {f"loss_by_context_size/{k}": own_bn[:, k] for k in range(n)}
    return {"loss_own_context": own_bn[:, -1], "loss_other_context": other_bn[:, -1], **by_size}


def mean_and_error(value_k: np.ndarray, record_k: np.ndarray) -> tuple[float, float | None]:
    """Return the mean of values and its standard error over records, which are what is drawn independently.

    Values of one record, where sets come again with other noise, are a cluster: their common deviation counts once, and
    no number of repetitions makes it smaller. (Liang and Zeger 1986, of a mean; G / (G - 1) for few clusters.)

    Args:
      value_k: one a set that was evaluated.
      record_k: the record that each set is of.

    Returns:
      The mean, and its standard error; None where all values are of one record.
    """
    value_k = np.asarray(value_k, np.float64)
    mean = value_k.mean()
    records, cluster_k = np.unique(record_k, return_inverse=True)
    if len(records) < 2:
        return float(mean), None
    deviation_g = np.bincount(cluster_k, value_k - mean)
    variance = len(records) / (len(records) - 1) * np.sum(deviation_g**2) / len(value_k) ** 2
    return float(mean), float(np.sqrt(variance))
