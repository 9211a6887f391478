"""The training objective: noised images are denoised, by a network that is told something of them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.keys import Domain, Stream, stream_key
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.unet import UNet, denoise_sets


class Told(NamedTuple):
    """What a network is told of the noised images of b sets, beside their latents. A task fills what its network has.

    Attributes:
      layout: which images are noised, and which clean ones they see.
      context: the clean images of `layout.clean`: latents or tokens, as `denoise_sets` takes them.
      text_bsc: tokens of each set's text.
      globals_bq: {name: values of all images of the stack}; see `denoise_sets`.
      keep_context_b: bool; the images of a set marked False see no clean image.

    Example:
        Told(SetLayout.training(4), context=latents_bnhwc[:, :-1])
    """

    layout: SetLayout
    context: jax.Array | None = None
    text_bsc: jax.Array | None = None
    globals_bq: Mapping[str, jax.Array] | None = None
    keep_context_b: jax.Array | None = None


def global_values(names: Iterable[str], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return {global embedding: values of all images of a batch}, [b, n, c]: its attributes of those names."""
    return {name: batch[f"attribute_{name}_bnc"] for name in names}


def stack_globals(
    layout: SetLayout, clean_bmc: Mapping[str, jax.Array], noised_bnc: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return values {name: [b, q, c]} of the images of a stack, as `Told` holds them.

    Args:
      clean_bmc, noised_bnc: values by position in the set, of those from which the stack's clean and noised images are.
    """
    clean_m, noised_n = (np.asarray(positions, int) for positions in (layout.stacked_clean, layout.noised))
    return {
        name: jnp.concatenate([clean_bmc[name][:, clean_m], noised_bnc[name][:, noised_n]], axis=1)
        for name in noised_bnc
    }


def squared_error(
    unet: UNet,
    schedule: NoiseSchedule,
    told: Told,
    target_bnhwc: Float[jax.Array, "b n h w c"],
    noise_bnhwc: Float[jax.Array, "b n h w c"],
    timestep_bn: Int[jax.Array, "b n"],
    *,
    clean_timestep: int,
) -> Float[jax.Array, "b n"]:
    """Return the mean squared error of the prediction for each noised image, [b, n]. Nothing is random here.

    Args:
      target_bnhwc: the latents to be denoised, one for each position of `told.layout.noised`.
      noise_bnhwc, timestep_bn: what they are noised with.
      clean_timestep: see `denoise_sets`.
    """
    noised_bnhwc = schedule.add_noise(target_bnhwc, noise_bnhwc, timestep_bn)
    output_bnhwc = denoise_sets(
        unet,
        told.context,
        noised_bnhwc,
        schedule.network_timestep(timestep_bn),
        told.layout,
        clean_timestep=clean_timestep,
        keep_context_b=told.keep_context_b,
        text_bsc=told.text_bsc,
        globals_bq=told.globals_bq,
    )
    error_bnhwc = output_bnhwc - schedule.target(target_bnhwc, noise_bnhwc, timestep_bn)
    return jnp.mean(error_bnhwc**2, axis=(2, 3, 4))


class SetDraws(NamedTuple):
    """What is random in the loss of a batch; every part has a leading axis of sets."""

    noise_bnhwc: jax.Array
    timestep_bn: jax.Array
    keep_context_b: jax.Array


def draw(schedule: NoiseSchedule, shape: tuple[int, ...], *, seed: int, step: jax.Array, config) -> SetDraws:
    """Return the draws of one training batch, which depend on `seed` and `step` alone.

    Timesteps are drawn independently for every image (not known of the paper). With probability
    `config.context_dropout` the noised images of a set see no context at all, for guidance.

    Args:
      shape: of the latents of whole sets, (b, n, h, w, c).
      config: `config.diffusion`.
    """
    b, n = shape[:2]
    noise_key, timestep_key, dropout_key = (
        stream_key(Domain.TRAIN, seed, step, stream)
        for stream in (Stream.NOISE, Stream.TIMESTEP, Stream.CONTEXT_DROPOUT)
    )
    return SetDraws(
        noise_bnhwc=jax.random.normal(noise_key, shape),
        timestep_bn=jax.random.randint(timestep_key, (b, n), 0, schedule.num_train_timesteps),
        keep_context_b=jax.random.uniform(dropout_key, (b,)) >= config.context_dropout,
    )


def weighted_loss(
    schedule: NoiseSchedule, error_bn: Float[jax.Array, "b n"], timestep_bn: Int[jax.Array, "b n"], config: Any
) -> Float[jax.Array, ""]:
    """Return the mean of errors, weighted by their noise levels as `config.diffusion.loss_weight` says.

    Args:
      config: `config.diffusion`.
    """
    return jnp.mean(schedule.loss_weight(timestep_bn, config.loss_weight, config.min_snr_gamma) * error_bn)
