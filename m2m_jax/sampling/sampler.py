"""Sample image sets from a Flax model: of a checkpoint, or of any parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2m_jax.core.compilation import saying_so
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, fingerprint
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.folder import config_from
from m2m_jax.models.frozen import IMAGE_ENCODER, FrozenModels, FrozenParams
from m2m_jax.models.unet_config import UNetConfig, with_todays_names
from m2m_jax.sampling.programs import UNET, AllParams, Programs, compiled
from m2m_jax.sampling.set_sampler import SetSampler
from m2m_jax.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from m2m_jax.checkpoints.saved_model import SavedModel


CACHE_SIZES = (4, 8, 16, 25)  # that a cache may have, up to `cache_size`: few, so that programs are compiled for few


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler(SetSampler):
    """Sample from a model, its schedule and settings. `SetSampler` has the methods.

    Attributes:
      unet_config: of the network.
      unet_params: of the network of `unet_config` (the EMA).
      models: the frozen models, whose parameters are `frozen`.
      schedule: what the network's output means.
      settings: stepper, guidance and cache.
      clean_timestep: what the U-Net is told about context images, as in training.
      image_size: pixels along each side.
      step: training step of the parameters.
      devices: devices of this process that share the sets of a batch; None: its first.

    Raises:
      UserError: the settings are none for this model or schedule.

    Example:
        sampler = Sampler.from_checkpoint("runs/demo", guidance_scale=1.5, steps=50)
        images = sampler(["a.png", "b.png"], num_images=4, seed=0)  # uint8 [4, size, size, 3]
    """

    unet_config: UNetConfig
    unet_params: Params
    models: FrozenModels
    frozen: FrozenParams
    schedule: NoiseSchedule
    settings: SamplingSettings
    clean_timestep: int
    image_size: int
    step: int = 0
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self):
        static = self.static  # refuses steppers and guidances that are none for this schedule or model
        of_set_sampler = {
            "num_steps": len(static.table.timestep),
            "cache_size": self.settings.cache_size,
            "slide": self.settings.slide,
            "encodes_generated": self.unet_config.attends_to_encoded,
            "reads_context": "set" in self.unet_config.attentions,
            "global_widths": self.unet_config.global_widths,
            "num_devices": len(self.devices or (None,)),
        }
        for name, value in of_set_sampler.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, step: int | None = None, devices: tuple[jax.Device, ...] | None = None, **settings
    ) -> Sampler:
        """Return a sampler of the EMA of a training run.

        Args:
          path: a workdir of `m2m_jax.train`, its folder of checkpoints, or one of these.
          step: which checkpoint; the latest if None.
          devices: see the attribute; whatever mesh the checkpoint was written on.
          **settings: fields of `SamplingSettings`, in the place of those that the run's config chose.

        Raises:
          UserError: no whole checkpoint of an M2M model there.
        """
        from m2m_jax.checkpoints.saved_model import load_for_sampling  # Orbax is slow to import

        return cls.from_saved(load_for_sampling(path, step), path, devices, **settings)

    @classmethod
    def from_saved(
        cls, saved: SavedModel, path: str | Path, devices: tuple[jax.Device, ...] | None = None, **settings
    ) -> Sampler:
        """Return a sampler of a checkpoint that is read already.

        Args:
          saved: what was read.
          path: where it was, for messages.
          devices, **settings: as in `from_checkpoint`.
        """
        try:
            config = saved.metadata["config"]
            if config["task"] != "set_diffusion":
                raise UserError(f"{path} holds a run of task {config['task']!r}, which samples no sets")
            return cls(
                unet_config=config_from(UNetConfig, with_todays_names(saved.metadata["unet"]), {}),
                unet_params=saved.ema_params,
                models=FrozenModels.from_metadata(saved.metadata["frozen"]),
                frozen=saved.frozen,
                schedule=NoiseSchedule.from_config(config["schedule"]),
                settings=SamplingSettings.chosen(config["sample"], settings),
                clean_timestep=range(2**31)[config["diffusion"]["clean_timestep"]],
                image_size=range(2**16)[config["data"]["image_size"]],
                step=saved.step,
                devices=devices,
            )
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"what {path} says of its model is damaged ({error!r}); use another checkpoint") from error

    @property
    def static(self) -> Programs:
        """The programs without their parameters.

        Their attention is plain XLA, whatever kernel the network trained with: they run on any platform.
        """
        unet_config = dataclasses.replace(self.unet_config, attention_backend="prefix")
        return Programs(unet_config, self.models, self.schedule, self.settings, self.image_size, self.clean_timestep)

    @property
    def params(self) -> AllParams:
        return {UNET: self.unet_params, **self.frozen}

    @functools.cached_property
    def programs(self) -> Mapping[str, Callable]:
        # Nothing here holds `self`: in a cycle, the parameters stay on the device until Python looks for cycles.
        params = jax.device_put(self.params, NamedSharding(self._mesh, PartitionSpec()))
        about = (self.static.unet_config, self.settings, self.image_size, self.num_devices)
        return {
            name: functools.partial(saying_so(f"{name!r} of the sampler", about, run), params)
            for name, run in compiled(self.static, self._mesh).items()
        }

    def empty_cache(self, seed_b: jax.Array, num_images: int) -> Any:
        sizes = [size for size in (*CACHE_SIZES, self.cache_size) if size >= min(num_images, self.cache_size)]
        return self.programs["empty_cache"](seed_b, size=min(*sizes, self.cache_size))

    def place(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec("data")))

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self.devices or jax.local_devices()[:1]), ("data",))

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint({f"{model}/{name}": x for model, of in self.params.items() for name, x in of.items()})

    @functools.cached_property
    def conditioned_on(self) -> str:
        return fingerprint(self.frozen[IMAGE_ENCODER]) if IMAGE_ENCODER in self.frozen else ""

    @property
    def about(self) -> dict[str, Any]:
        """What is to be known of the images."""
        return {"step": self.step, "settings": dataclasses.asdict(self.settings)}
