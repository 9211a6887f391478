"""Images from captions: the generator of image sets, from a Stable Diffusion folder or from a run of this project.

Image j of caption i is drawn from noise of (seed, i, j), whatever else is drawn beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2m_jax.core.compilation import saying_so
from m2m_jax.core.errors import UserError
from m2m_jax.core.keys import Domain, domain_key
from m2m_jax.core.parameters import Params, fingerprint
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models import diffusers_folder, text_encoders
from m2m_jax.models.context_cache import Text
from m2m_jax.models.folder import config_from, read_json, require_same
from m2m_jax.models.frozen import AUTOENCODER, TEXT_ENCODER, FrozenModels, FrozenParams
from m2m_jax.models.tokenizer import Tokenizer, load_tokenizer
from m2m_jax.models.unet import unet_structure
from m2m_jax.models.unet_config import UNetConfig, with_todays_names
from m2m_jax.sampling.programs import UNET, AllParams, Programs
from m2m_jax.sampling.settings import SamplingSettings

Numbers = Sequence[int] | np.ndarray

if TYPE_CHECKING:
    from m2m_jax.checkpoints.saved_model import SavedModel

MODEL_INDEX = "model_index.json"
PIPELINE = "StableDiffusionPipeline"
FOLDER_SETTINGS = {"stepper": "ddim", "steps": 50, "guidance_scale": 7.5}  # steps and guidance: diffusers' own


@dataclasses.dataclass(frozen=True)
class TextPrograms(Programs):
    """The programs of a text-to-image model: those of `Programs` under captions, with no set around the image."""

    def __post_init__(self):
        super().__post_init__()
        self.models.require_image_size(self.image_size, len(self.unet_config.block_out_channels))
        if self.settings.guidance_scale < 1:
            raise UserError(
                f"guidance_scale is {self.settings.guidance_scale}, which takes the caption away: 1 is no guidance "
                "(diffusers' is any value up to 1)"
            )

    def generate(
        self,
        params: AllParams,
        token_ids_bs: jax.Array,
        empty_ids_1s: jax.Array,
        index_b: jax.Array,
        images_n: jax.Array,
        seed: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return latents [b, n, h, w, c], float32 and scaled, and uint8 images [b, n, image_size, image_size, 3]."""
        b, n = len(index_b), len(images_n)

        def key(index, image):
            return jax.random.fold_in(jax.random.fold_in(domain_key(Domain.TEXT_TO_IMAGE, seed), index), image)

        key_k = jax.vmap(lambda index: jax.vmap(lambda image: key(index, image))(images_n))(index_b).reshape(b * n)
        caption_ksc = jnp.repeat(self.models.encode_text(params, token_ids_bs), n, axis=0)
        text = Text(caption_ksc, self.models.encode_text(params, empty_ids_1s))
        steps = len(self.table.timestep)
        latents_khwc = self.walk(params, key_k, self.start(key_k), 0, steps, text=text)["x"]
        latents_bnhwc = latents_khwc.reshape(b, n, *latents_khwc.shape[1:])
        return latents_bnhwc, self.decode(params, latents_bnhwc)


@functools.cache
def _compiled(programs: TextPrograms, mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Once for all generators of a run, whose previews each make one. Each device runs the program by itself: left to
    XLA they exchange halves of the guided batch at every step."""
    shared, split = PartitionSpec(), PartitionSpec("data")
    specs = (shared, split, shared, split, shared, shared)
    return jax.jit(jax.shard_map(programs.generate, mesh=mesh, in_specs=specs, out_specs=split))


class TextToImage:
    """A text-to-image model with its parameters in place.

    Attributes:
      image_size: pixels along each side.
      num_devices: that share the captions of a call.
    """

    def __init__(
        self,
        programs: TextPrograms,
        params: AllParams,
        tokenizer: Tokenizer,
        devices: Sequence[jax.Device] | None = None,
    ):
        """params: {"unet": ..., and each frozen model's}. devices: this process's, if None."""
        self.image_size, self._programs = programs.image_size, programs
        self._mesh = Mesh(np.array(devices or jax.local_devices()), ("data",))
        self.num_devices = self._mesh.size
        self._tokenizer, self._empty_ids_1s = tokenizer, tokenizer([""])
        self._params = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))
        about = (programs.unet_config, programs.settings, self.image_size, self.num_devices)
        self._generate = saying_so("'generate' of the sampler", about, _compiled(programs, self._mesh))

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What its images depend on beside captions and seed, as JSON can hold it. Reads all weights."""
        weights = {name: fingerprint(of_model) for name, of_model in sorted(self._params.items())}
        return {
            "weights": weights | {"tokenizer": hashlib.sha256(self._tokenizer.text.encode()).hexdigest()},
            "schedule": self._programs.schedule.to_config(),
            "settings": dataclasses.asdict(self._programs.settings),
            "dtype": self._programs.unet_config.dtype,
            "image_size": self._programs.image_size,
        }

    @property
    def autoencoder(self) -> tuple[Any, Params]:
        """The config of the one whose latents it makes, and its parameters."""
        return self._programs.models.autoencoder, self._params[AUTOENCODER]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        return self._programs.models.latent_shape(self.image_size)

    def generate(
        self, captions: Sequence[str], index_b: Numbers, images_n: Numbers, seed: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return images number `images_n` of each caption, at once, before the device has made them.

        Args:
          captions: b of them, a multiple of `num_devices`.
          index_b: the number of each, of which its noise depends.

        Returns:
          Latents float32 [b, n, h, w, c], scaled; images uint8 [b, n, image_size, image_size, 3].
        """
        return self.generate_from_ids(self._tokenizer(captions), index_b, images_n, seed)

    def generate_from_ids(
        self, token_ids_bs: np.ndarray, index_b: Numbers, images_n: Numbers, seed: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return what `generate` does, of captions that are token ids already."""
        numbers = (np.asarray(x, np.uint32) for x in (index_b, images_n, seed))
        return self._generate(self._params, token_ids_bs, self._empty_ids_1s, *numbers)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        image_size: int | None = None,
        dtype: str | None = None,
        devices: Sequence[jax.Device] | None = None,
        **settings,
    ) -> TextToImage:
        """Open a Stable Diffusion folder in diffusers' layout, or a run of `task=text_to_image`.

        Args:
          image_size: pixels along each side, if not those that the model was trained at.
          dtype: of the U-Net's computation; None: float32, or what a run trained in.
          settings: fields of `SamplingSettings`; what is not given, a run's config says, of a folder FOLDER_SETTINGS.

        Raises:
          UserError: it is neither, or a part is missing or another model's.
        """
        settings = {name: value for name, value in settings.items() if value is not None}
        if (Path(path) / MODEL_INDEX).is_file():
            return _open_folder(cls, Path(path), image_size, dtype, devices, settings)
        if Path(path).is_dir() and any((Path(path) / name).is_dir() for name in ("unet", "vae", "text_encoder")):
            raise UserError(f"{path} has no {MODEL_INDEX}: name the folder of a whole Stable Diffusion pipeline")
        from m2m_jax.checkpoints.saved_model import load_for_sampling  # Orbax is slow to import

        return cls.from_saved(
            load_for_sampling(path), path, image_size=image_size, dtype=dtype, devices=devices, **settings
        )

    @classmethod
    def from_saved(
        cls,
        saved: SavedModel,
        path: str | Path,
        *,
        image_size: int | None = None,
        dtype: str | None = None,
        devices: Sequence[jax.Device] | None = None,
        **settings,
    ) -> TextToImage:
        """Return the model of a checkpoint that was read already; path: where, for messages."""
        try:
            config = saved.metadata["config"]
            if config["task"] != "text_to_image":
                raise UserError(f"{path} holds a run of task {config['task']!r}, which makes no images of text")
            # Plain XLA, whatever kernel it trained with: it runs on any platform.
            unet = {**saved.metadata["unet"], "attention_backend": "prefix", **({"dtype": dtype} if dtype else {})}
            models = FrozenModels.from_metadata(saved.metadata["frozen"])
            programs = TextPrograms(
                config_from(UNetConfig, with_todays_names(unet), {}),
                models,
                NoiseSchedule.from_config(config["schedule"]),
                SamplingSettings.chosen(config["sample"], settings),
                image_size or range(2**16)[config["data"]["image_size"]],
            )
            models.require_params(saved.frozen, dict.fromkeys(saved.frozen, str(path)))
            tokenizer = Tokenizer(saved.metadata["tokenizer"])
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"what {path} says of its model is damaged ({error!r}); use another checkpoint") from error
        return cls(programs, {UNET: saved.ema_params, **saved.frozen}, tokenizer, devices)


def _open_folder(
    cls, folder: Path, image_size: int | None, dtype: str | None, devices: Sequence[jax.Device] | None, settings: dict
) -> TextToImage:
    kind = read_json(folder / MODEL_INDEX).get("_class_name")
    if kind != PIPELINE:
        raise UserError(f"{folder} is a {kind}; image sets are built with a {PIPELINE} (Stable Diffusion 1.x, 2.x)")
    unet_folder, text_folder = folder / "unet", folder / "text_encoder"
    unet_config = diffusers_folder.load_unet_config(unet_folder, dtype=dtype or "float32")
    autoencoder = diffusers_folder.load_autoencoder_config(folder / "vae")
    text_encoder, text_params = text_encoders.load_text_encoder(text_folder)
    if "text" not in unet_config.attentions or unet_config.cross_attention_dim != text_encoder.hidden_size:
        raise UserError(
            f"{unet_folder} attends to tokens of width {unet_config.cross_attention_dim}, and {text_folder} makes some "
            f"of {text_encoder.hidden_size}: these are of two models"
        )
    if unet_config.in_channels != autoencoder.latent_channels:
        raise UserError(
            f"{unet_folder} takes {unet_config.in_channels} channels, and latents of {folder / 'vae'} have "
            f"{autoencoder.latent_channels}: not a text-to-image model, or of two"
        )
    models = FrozenModels(autoencoder, text_encoder=text_encoder)
    frozen: FrozenParams = {AUTOENCODER: diffusers_folder.load_params(folder / "vae"), TEXT_ENCODER: text_params}
    models.require_params(frozen, {AUTOENCODER: str(folder / "vae"), TEXT_ENCODER: str(text_folder)})
    unet_params = diffusers_folder.load_params(unet_folder)
    require_same(unet_folder, unet_structure(unet_config)[1], unet_params)
    chosen = SamplingSettings.chosen(FOLDER_SETTINGS, settings)
    programs = TextPrograms(
        unet_config,
        models,
        _schedule(folder / "scheduler" / diffusers_folder.SCHEDULER, chosen.stepper),
        chosen,
        image_size or _trained_at(unet_folder) * autoencoder.downsampling,
    )
    tokenizer = load_tokenizer(str(folder / "tokenizer"), text_encoder.max_position_embeddings)
    return cls(programs, {UNET: unet_params, **frozen}, tokenizer, devices)


def _schedule(file: Path, stepper: str) -> NoiseSchedule:
    """Return the schedule of a pipeline; where its file says nothing, what diffusers takes.

    Each of its schedulers has a spacing of its own, and the pipeline makes the offset 1 whatever the file says.
    """
    schedule, values = diffusers_folder.load_schedule(file), read_json(file)
    if schedule.is_flow:
        return schedule
    spacing = schedule.timestep_spacing
    if "timestep_spacing" not in values:
        spacing = "leading" if stepper in ("ddim", "ddpm") else "linspace"
    return dataclasses.replace(schedule, timestep_spacing=spacing, steps_offset=1)


def _trained_at(unet_folder: Path) -> int:
    """Side of the latents that a U-Net of diffusers makes."""
    values = read_json(unet_folder / "config.json")
    side, version = values.get("sample_size", 64), re.match(r"(\d+)\.(\d+)", str(values.get("_diffusers_version", "")))
    if type(side) is not int:
        raise UserError(f"{unet_folder}/config.json: sample_size is {side!r:.60}; give the image size")
    # Before 0.9 the configs of Stable Diffusion 1.x said 32, and diffusers still takes that for 64.
    return 64 if version and tuple(map(int, version.groups())) < (0, 9) and side < 64 else side
