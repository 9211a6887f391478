"""The frozen models beside the U-Net: the autoencoder and, for M2M-DINO, the image encoder; for text, its encoder.

They decide what the clean images of a set are to the U-Net: latents that stand in its stack, or tokens that it attends
to; and what a caption is.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jaxtyping import Float, Int, UInt8

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models import diffusers_folder, text_encoders
from m2m_jax.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    autoencoder_structure,
    pixels_to_float,
    pixels_to_uint8,
)
from m2m_jax.models.folder import config_from, require_same
from m2m_jax.models.image_encoders import IMAGE_ENCODERS, ImageEncoder, ImageEncoderConfig
from m2m_jax.models.limits import require_one_of
from m2m_jax.models.precision import PRECISIONS, products_in
from m2m_jax.models.text_encoders import TEXT_ENCODERS, TextEncoderConfig

if TYPE_CHECKING:
    from m2m_jax.configuration import Config  # sampling does without

# The keys of their parameters: {AUTOENCODER: {name: array}, IMAGE_ENCODER: ...}.
AUTOENCODER, IMAGE_ENCODER, TEXT_ENCODER = "autoencoder", "image_encoder", "text_encoder"
FrozenParams = dict[str, dict[str, Any]]  # of JAX; of NumPy, as they are read from folders


def of_models(params: FrozenParams) -> FrozenParams:
    """Leave out what only a step needs, and no checkpoint: a perceptual network, images that the device holds."""
    return {name: x for name, x in params.items() if name in (AUTOENCODER, IMAGE_ENCODER, TEXT_ENCODER)}


@dataclasses.dataclass(frozen=True)
class FrozenModels:
    """What the frozen models are; static and hashable, apart from their parameters, which every method is given.

    Attributes:
      image_encoder: None in M2M-Self.
      image_encoder_size: pixels along each side of the images as the encoder sees them.
      text_encoder: of a text-to-image model; None in M2M.
      precision: what their products of float32 are computed in; see `models/precision.py`.

    Example:
        models, params = FrozenModels.load(config)
        latents_bnhwc = models.encode(params, images_bnhwc)
    """

    autoencoder: AutoencoderConfig
    image_encoder: ImageEncoderConfig | None = None
    image_encoder_size: int = 0
    text_encoder: TextEncoderConfig | None = None
    precision: str = "default"

    def __post_init__(self):
        require_one_of(self, precision=PRECISIONS)

    @classmethod
    def load(cls, config: "Config") -> tuple["FrozenModels", FrozenParams]:
        """Read those of a run from the folders that `autoencoder`, `image_encoder` and `text_encoder` in `config` name.

        Raises:
          UserError: a folder holds another model, or not all of it, or none.
        """
        folder = config.autoencoder.path
        autoencoder = diffusers_folder.load_autoencoder_config(folder)
        params = {AUTOENCODER: diffusers_folder.load_params(folder)}
        if not config.image_encoder.path:
            models = cls(autoencoder)
        else:
            folder, size = config.image_encoder.path, config.image_encoder.image_size
            kind = IMAGE_ENCODERS.of_folder(folder)
            encoder = kind.load_config(folder, layer=config.image_encoder.layer, dtype=config.model.dtype)
            try:
                kind.num_tokens(encoder, size)
            except UserError as error:
                raise UserError(f"config.image_encoder.image_size is {size}; {error} ({folder})") from error
            models = cls(autoencoder, encoder, size)
            params[IMAGE_ENCODER] = kind.load_params(folder)
        if config.text_encoder.path:
            text_encoder, params[TEXT_ENCODER] = text_encoders.load_text_encoder(config.text_encoder.path)
            models = dataclasses.replace(models, text_encoder=text_encoder)
        models = dataclasses.replace(models, precision=config.model.precision)
        models.require_params(params, {name: getattr(config, name).path for name in params})
        return models, params

    @classmethod
    def from_metadata(cls, values: dict[str, Any]) -> "FrozenModels":
        """Return those of a checkpoint, from what `metadata` gave."""
        encoder = values["image_encoder"]
        return cls(
            config_from(AutoencoderConfig, values["autoencoder"], {}),
            # Runs of before knew DINOv2 alone, and did not name it.
            IMAGE_ENCODERS.from_metadata({"model_type": "dinov2", **encoder}) if encoder else None,
            values["image_encoder_size"],
            TEXT_ENCODERS.from_metadata(values["text_encoder"]) if values["text_encoder"] else None,
            values.get("precision", "default"),  # runs of before had no choice
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """What they are, as JSON can hold it."""
        encoders = {
            IMAGE_ENCODER: IMAGE_ENCODERS.to_metadata(self.image_encoder) if self.image_encoder else None,
            TEXT_ENCODER: TEXT_ENCODERS.to_metadata(self.text_encoder) if self.text_encoder else None,
        }
        return dataclasses.asdict(self) | encoders

    @property
    def shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """The shapes of their parameters."""
        shapes = {AUTOENCODER: self._autoencoder_and_shapes[1]}
        if self.image_encoder:
            shapes[IMAGE_ENCODER] = self._encoder_and_shapes[1]
        if self.text_encoder:
            shapes[TEXT_ENCODER] = self._text_encoder_and_shapes[1]
        return shapes

    def require_params(self, params: FrozenParams, folders: dict[str, str]) -> None:
        """Raise UserError where `params`, read from `folders`, are not those of these models."""
        for name, shapes in self.shapes.items():
            require_same(folders[name], shapes, params[name])

    def require_image_size(self, image_size: int, unet_levels: int = 1) -> None:
        """Raise UserError for a size that the autoencoder and, after it, a U-Net of so many levels cannot halve as
        often as they do: the images that come back would have another."""
        factor = self.autoencoder.downsampling * 2 ** (unet_levels - 1)
        if image_size < factor or image_size % factor:
            whom = "autoencoder needs" if unet_levels == 1 else f"autoencoder and a U-Net of {unet_levels} levels need"
            raise UserError(f"image_size is {image_size}; the {whom} a multiple of {factor}")

    @property
    def context_tokens(self) -> int | None:
        """Tokens of an image by the image encoder; None: the U-Net attends to its own features."""
        if self.image_encoder is None:
            return None
        return self._image_encoder.num_tokens(self.image_encoder, self.image_encoder_size)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (h, w, c) of the latents of an image of so many pixels a side."""
        side = image_size // self.autoencoder.downsampling
        return side, side, self.autoencoder.latent_channels

    def encode(self, params: FrozenParams, images_bnhwc: UInt8[jax.Array, "*b H W 3"]) -> Float[jax.Array, "*b h w c"]:
        """Return scaled latents of uint8 images."""
        autoencoder = merge(self._autoencoder_and_shapes[0], params[AUTOENCODER])
        with products_in(self.precision):
            return autoencoder.encode(pixels_to_float(images_bnhwc))

    def decode(self, params: FrozenParams, latents_bnhwc: Float[jax.Array, "*b h w c"]) -> UInt8[jax.Array, "*b H W 3"]:
        """Return uint8 images of scaled latents."""
        autoencoder = merge(self._autoencoder_and_shapes[0], params[AUTOENCODER])
        with products_in(self.precision):
            return pixels_to_uint8(autoencoder.decode(latents_bnhwc))

    def context(self, params: FrozenParams, images_bmhwc: UInt8[jax.Array, "b m H W 3"]) -> Float[jax.Array, "b m ..."]:
        """Return what the U-Net is given of uint8 images: latents, or tokens [b, m, s, c] of the image encoder."""
        if self.image_encoder is None:
            return self.encode(params, images_bmhwc)
        encoder = merge(self._encoder_and_shapes[0], params[IMAGE_ENCODER])
        flat_bhwc = jax.lax.collapse(pixels_to_float(images_bmhwc), 0, 2)
        with products_in(self.precision):
            tokens_bsc = encoder(self._image_encoder.preprocess(flat_bhwc, self.image_encoder_size))
        return tokens_bsc.reshape(*images_bmhwc.shape[:2], *tokens_bsc.shape[1:])

    def encode_text(self, params: FrozenParams, token_ids_bs: Int[jax.Array, "b s"]) -> Float[jax.Array, "b s c"]:
        """Return the tokens [b, s, c] that the U-Net attends to, of ids of captions."""
        encoder = merge(self._text_encoder_and_shapes[0], params[TEXT_ENCODER])
        with products_in(self.precision):
            return text_encoders.encode_text(self.text_encoder, encoder, token_ids_bs)

    @property
    def _image_encoder(self) -> ImageEncoder:
        return IMAGE_ENCODERS.of_config(self.image_encoder)

    @functools.cached_property
    def _autoencoder_and_shapes(self) -> tuple[nnx.GraphDef[AutoencoderKL], dict[str, jax.ShapeDtypeStruct]]:
        return autoencoder_structure(self.autoencoder)

    @functools.cached_property
    def _encoder_and_shapes(self) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
        return abstract(lambda: self._image_encoder.model(self.image_encoder, rngs=nnx.Rngs(0)))

    @functools.cached_property
    def _text_encoder_and_shapes(self) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
        return abstract(lambda: text_encoders.make_text_encoder(self.text_encoder))
