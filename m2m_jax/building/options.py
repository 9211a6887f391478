"""Options of the programs that make data sets and model folders."""

import dataclasses
from pathlib import Path

from m2m_jax.building.image_formats import IMAGE_FORMATS
from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, option
from m2m_jax.core.work_sharing import SharedWork
from m2m_jax.data.records import LATENT_DTYPES, MAX_IMAGES_PER_RECORD, STORES
from m2m_jax.sampling.options import FromCheckpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetBuild(SharedWork):
    """What image sets are made from, by what, and how they are stored.

    Example:
        SetBuild(captions="captions.tsv", generator="runs/t2i", output="data", images_per_set=4)
    """

    captions: Path = option("File of captions: .txt, .tsv, .jsonl or .parquet.")
    generator: Path = option("Stable Diffusion folder, or a text-to-image run.")
    output: Path = option("Folder to build in, or to go on in: data.path.")
    seed: int = option("Of the noise.", 0, low=0)
    images_per_set: int = option("Images of a caption.", MAX_IMAGES_PER_RECORD, low=1, high=MAX_IMAGES_PER_RECORD)
    image_size: int | None = option("Pixels a side; the generator's own if not given.", None)
    steps: int | None = option("Of the stepper, an image; the generator's default if not given.", None)
    stepper: str | None = option("Name of the stepper; the generator's default if not given.", None)
    dtype: str | None = option(
        "Of the U-Net's computation; the generator's default if not given.", None, choices=("float32", "bfloat16")
    )
    guidance_scale: float | None = option("Of the caption; the generator's default if not given.", None)

    store: str = option("What records hold.", "images", choices=STORES)
    image_format: str = option("Of stored images.", "webp_lossless", choices=IMAGE_FORMATS)
    quality: int = option("Of --image_format=webp.", 90, low=1, high=100)
    latents_dtype: str = option("What latents are stored as.", "float16", choices=LATENT_DTYPES)
    sets_per_shard: int = option("Captions in a shard: what a kill can cost.", 512, low=1)
    validation_share: float = option("Of the captions, those for validation, by a hash of each.", 0.01, low=0.0)
    test_share: float = option("Of the captions, those for the test, by a hash of each.", 0.01, low=0.0)

    sets_at_once: int = option("A device makes together.", 1, low=1)
    images_at_once: int | None = option("Of each set; all if not given.", None, low=1)

    def __post_init__(self):
        super().__post_init__()
        if self.images_at_once and self.images_per_set % self.images_at_once:
            raise UserError(
                f"--images_at_once={self.images_at_once} must divide --images_per_set={self.images_per_set}"
            )
        if self.validation_share + self.test_share >= 1:
            raise UserError(
                f"--validation_share={self.validation_share} and --test_share={self.test_share}: must leave captions "
                "to train on"
            )
        _require_folder(self.output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precomputation(SharedWork):
    """Which split is encoded, by what, and how latents are stored."""

    split: str = option("Which split of the data set.", "train")
    output: Path = option("Folder to write, or to complete: data.path.")
    autoencoder: Path | None = option("Folder in diffusers' layout; config.autoencoder.path if not given.", None)
    dtype: str = option("What latents are stored as.", "float32", choices=LATENT_DTYPES)
    keep_images: bool = option("Store the encoded images beside their latents.", False)
    records_per_shard: int = option("Sets in a shard.", 512, low=1)
    batch_size: int = option("Images encoded at once.", 64, low=1)

    def __post_init__(self):
        super().__post_init__()
        _require_folder(self.output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelExport(FromCheckpoint):
    """Which run becomes which model folder."""

    output: Path = option("Folder to write.")
    dtype: str = option("What the weights are stored in.", "float16", choices=("float16", "float32"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderCopy(Options):
    """Where the text encoder goes."""

    output: Path = option("Folder to write; must not exist.", Path("data/minilm"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderCopy(Options):
    """Where the image encoder goes."""

    output: Path = option("Folder to write; must not exist.", Path("data/vit_s14"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualNetworkCopy(Options):
    """Where the perceptual network goes."""

    network: str = option("Which of the two.", "vgg", choices=("vgg", "alex"))
    output: Path = option("Folder to write; must not exist.", Path("data/stlpips_vgg"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierCopy(Options):
    """Where the classifier goes."""

    output: Path = option("Folder to write; must not exist.", Path("data/efficientnet_lite0"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionCopy(Options):
    """What Inception-v3 is made of, and where it goes."""

    weights: Path = option("State dict of pytorch-fid, a .pth file.")
    output: Path = option("Folder to write; must not exist.", Path("data/inception_v3"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConseCopy(Options):
    """What ConSE is made of, and where it goes."""

    classifier: Path = option("Folder of EfficientNet-Lite0.", Path("data/efficientnet_lite0"))
    text_encoder: Path = option("Folder of MiniLM.", Path("data/minilm"))
    output: Path = option("Folder to write; must not exist.", Path("data/conse"))


def _require_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
