"""The configuration of a training run: every field with its type, its default, its limits and what it means.

A file in `configs/` starts from `default_config()` and changes what it must; the command line overrides single fields
(`--config.train.steps=100`). What fields are made of stands in `config_fields.py`; `config_rules.validate` looks at
their values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from m2m_jax.config_fields import Group, chosen, field, fields_of, names_of, options_of, unknown_field
from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
MAX_IMAGES_PER_SET = 25  # the paper's sets; a record holds no more
# A run of a few seconds, for tests: what the presets `:tiny` of configs/ begin with.
TINY: Mapping[str, Any] = {
    "data.batch_size": 8,
    "optimizer.warmup_steps": 2,
    "train.steps": 4,
    "train.log_every": 2,
    "eval.every": 4,
    "eval.batches": 1,
    "eval.batch_size": 8,
    "sample.steps": 2,
    "checkpoint.every": 4,
}


@dataclasses.dataclass
class Augment(Group, prefix="data.augment."):
    """Augmentations: drawn once a set, and shared by its images."""

    enabled: bool = field(True, "Whether sets are augmented.")
    on_device: bool = field(False, "Whether a training step augments, and not the host: the same images, to the bit.")
    hue_degrees: float = field(180.0, "Hues are rotated by up to so many degrees, either way.", low=0, high=180)
    ground_probability: float = field(0.5, "Probability of a coloured ground instead of a white one.", low=0, high=1)
    ink_probability: float = field(0.5, "Probability that black line art is drawn in a dark colour.", low=0, high=1)
    contrast: float = field(0.2, "Contrast changes by up to this fraction, either way.", low=0, high=0.99)
    scale: float = field(
        0.15, "Size changes by up to this fraction: smaller on a ground, larger where there is none.", low=0, high=0.99
    )
    mirror_probability: float = field(0.5, "Probability of a mirrored set.", low=0, high=1)


@dataclasses.dataclass
class Data(Group, prefix="data."):
    """The image sets."""

    name: str = field("emoji", "Kind of data set.", choices="m2m_jax.data.source:SOURCES")
    path: str = field(
        "",
        "Where the data set lies. folder: the folder of folders of images; precomputed and mis: the --output of the "
        "program that made it.",
        path=True,
    )
    options: dict[str, Any] = options_of("name", "Fields that only this kind of data set has.")
    follow_links: bool = field(
        False,
        "Whether links that lead out of data.path are followed, as in hub caches, DVC and git-annex; read by folder. "
        "Only images and captions are read through links, but whoever made a link chose the file on this machine.",
    )
    latents: bool = field(
        False, "Whether to train on the stored latents and not on the images; read by mis, which may hold both."
    )
    directory: str = field("data", "Folder of prepared data sets, the data_dir of TFDS.", path=True)
    image_size: int = field(32, "Width and height of the images, in pixels.", low=8)
    images_per_set: int = field(
        4, "Images used of each set; sets with fewer are left out.", low=1, high=MAX_IMAGES_PER_SET
    )
    batch_size: int = field(16, "Sets in each training step, over all processes.", low=1)
    train_split: str = field("train", "Split to train on.")
    eval_split: str = field("validation", "Split to evaluate on during training.")
    kinds: tuple[str, ...] = field(
        ("style", "content"), "Kinds of emoji sets to use: of one style, of one content.", choices=("style", "content")
    )
    prefetch: int = field(2, "Batches to prepare in the background.", low=0)
    threads: int = field(2, "Threads that read, decode and augment.", low=1)
    workers: int = field(
        0, "Processes that do so, each with data.threads threads; 0: the training process itself.", low=0
    )
    resident: bool = field(
        False,
        "Whether every device holds all images of the training split, decoded, and a step picks and augments its own: "
        "the same images, to the bit. For small data sets: an image of 64 px takes 16 KB.",
    )
    log_examples: bool = field(False, "Whether each process logs which sets it saw at which step, in WORKDIR/examples.")
    on_error: str = field(
        "stop",
        "What to do about a damaged record: stop the run, or skip it: always the same other set takes its place.",
        choices=("stop", "skip"),
    )
    caption_tag_dropout: float = field(
        0.0,
        "Probability that a tag of a caption, between commas, is dropped; read by task=text_to_image.",
        low=0,
        high=1,
    )
    augment: Augment = dataclasses.field(default_factory=Augment)

    def check(self) -> None:
        if reads_latents(self) and self.augment.enabled:
            raise UserError(
                "config.data.augment.enabled is True; precomputed latents cannot be augmented: "
                "set --config.data.augment.enabled=False, or train on the images"
            )
        if reads_latents(self) and self.resident:
            raise UserError("config.data.resident is True; devices hold images, and this config trains on latents")


@dataclasses.dataclass
class Autoencoder(Group, prefix="autoencoder."):
    """The first stage. All but its path is read by task=autoencoder alone: a frozen one's folder says what it is."""

    path: str = field("pretrained/vae", "Folder of the frozen autoencoder, in diffusers' layout.", path=True)
    block_out_channels: tuple[int, ...] = field((32, 64, 64), "Channels of each level.", low=1)
    layers_per_block: int = field(1, "Residual blocks of a level.", low=1)
    latent_channels: int = field(4, "Channels of a latent.", low=1)
    norm_num_groups: int = field(16, "Groups of the group norms.", low=1)
    kl_weight: float = field(1e-4, "Weight of the divergence from a unit normal, beside the errors of pixels.", low=0)
    perceptual_path: str = field(
        "", "Folder of m2m_jax.data.prepare_stlpips, for a perceptual loss beside it; empty: without.", path=True
    )
    perceptual_weight: float = field(0.5, "Weight of the distance by ST-LPIPS, beside the errors of pixels.", low=0)
    perceptual_slices: int = field(
        3,
        "Slices of that network that the loss reads, of five; the first see detail, and cost the least.",
        low=1,
        high=5,
    )
    perceptual_share: float = field(
        0.125, "Share of each batch that is compared so: it costs more than the autoencoder.", low=0, high=1
    )


@dataclasses.dataclass
class Model(Group, prefix="model."):
    """The U-Net, in diffusers' words."""

    formerly = MappingProxyType(
        {"attn2": ("attentions", {"image_set": ("self", "set"), "text": ("self", "text"), "none": ("self",)})}
    )

    block_out_channels: tuple[int, ...] = field((64, 128), "Channels of each level.", low=1)
    layers_per_block: int = field(1, "Residual blocks of a level.", low=1)
    down_block_types: tuple[str, ...] = field(
        ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "Block of each level, with or without attention; the way up mirrors the way down.",
        choices="m2m_jax.models.unet_config:BLOCK_TYPES",
    )
    num_attention_heads: tuple[int, ...] = field((2, 4), "Attention heads of each level.", low=1)
    transformer_layers_per_block: int = field(1, "Transformer layers after a residual block.", low=1)
    norm_num_groups: int = field(16, "Groups of the group norms.", low=1)
    norm_eps: float = field(1e-5, "Number added to the variance in the group norms.", low=1e-12, high=1)
    use_linear_projection: bool = field(
        True,
        "Whether transformers stand between linear layers, as in Stable Diffusion 2.x, or 1x1 convolutions, as in 1.x.",
    )
    attentions: tuple[str, ...] = field(
        ("self", "set"),
        "Attentions of a transformer block, in order: self,set for M2M; self,text for task=text_to_image; self for a "
        "model of single images.",
        choices="m2m_jax.models.attentions:ATTENTIONS",
    )
    global_embeddings: tuple[str, ...] = field(
        (),
        "What the network is told of each image as a whole, beside its timestep: attributes of the data set's images.",
        choices="m2m_jax.models.embedders:EMBEDDERS",
    )
    order_embedding: bool = field(False, "Whether Image-Set Attention is told the positions of images in their set.")
    clean_sees: str = field(
        "preceding",
        "What clean images attend to: preceding: those before them, too; itself: themselves alone.",
        choices="m2m_jax.attention.layout:CLEAN_SEES",
    )
    attention_backend: str = field(
        "auto",
        "Implementation of attention within images and within sets; auto: the fastest on the platform.",
        choices="m2m_jax.attention.backends:BACKENDS",
        also=("auto",),
    )
    remat: str = field(
        "none",
        "What the backward pass computes again to save memory.",
        choices="m2m_jax.models.remat:REMAT",
    )
    precision: str = field(
        "default",
        "Precision of products of float32 matrices, in every network: the device's default (TF32 on GPUs, bfloat16 on "
        "TPUs), or the highest, float32.",
        choices="m2m_jax.models.precision:PRECISIONS",
    )
    dtype: str = field(
        "float32",
        "Type that the U-Net computes in; its parameters are always float32.",
        choices=("float32", "bfloat16"),
    )


@dataclasses.dataclass
class ImageEncoder(Group, prefix="image_encoder."):
    """M2M-DINO: preceding images enter as tokens of this frozen encoder. With an empty path M2M-Self: as latents."""

    path: str = field(
        "", "Folder of a DINOv2, or of another image encoder, in transformers' layout; empty: M2M-Self.", path=True
    )
    image_size: int = field(
        224, "Width and height of the images that it is shown, in pixels; a multiple of its patch size.", low=1
    )
    layer: int = field(-1, "Take its tokens after so many blocks; -1: after all blocks and the last norm.", low=-1)


@dataclasses.dataclass
class TextEncoder(Group, prefix="text_encoder."):
    """Read by task=text_to_image."""

    path: str = field(
        "", "Folder of a CLIP text encoder or a BERT, with its tokenizer, in transformers' layout.", path=True
    )
    max_tokens: int = field(77, "Tokens of a caption; longer captions are cut.", low=2)


@dataclasses.dataclass
class Init(Group, prefix="init."):
    """What training starts from."""

    path: str = field(
        "pretrained/unet",
        "Folder in diffusers' layout to start from, of a U-Net or, for task=autoencoder, of an autoencoder; empty: "
        "start from scratch.",
        path=True,
    )


@dataclasses.dataclass
class Schedule(Group, prefix="schedule."):
    """Noise levels, in the words of diffusers' scheduler_config.json."""

    num_train_timesteps: int = field(1000, "Number of noise levels.", low=2)
    beta_schedule: str = field(
        "squaredcos_cap_v2",
        "How noise grows with the timestep.",
        choices="m2m_jax.diffusion.schedule:BETA_SCHEDULES",
    )
    beta_start: float = field(0.00085, "Beta of the first timestep; read by linear and scaled_linear.", low=0, high=1)
    beta_end: float = field(0.012, "Beta of the last timestep; read by linear and scaled_linear.", low=0, high=1)
    rescale_betas_zero_snr: bool = field(
        True,
        "Whether the last timestep becomes pure noise, which sampling starts from; read by all schedules with betas.",
    )
    prediction_type: str = field(
        "v_prediction",
        "What the network predicts: flow with rectified_flow, and one of the others with any other schedule.",
        choices="m2m_jax.diffusion.schedule:PREDICTION_TYPES",
    )
    timestep_spacing: str = field(
        "trailing", "Which timesteps sampling visits.", choices="m2m_jax.diffusion.schedule:TIMESTEP_SPACINGS"
    )
    shift: float = field(1.0, "Above 1, more timesteps have much noise; read by rectified_flow.", low=1e-6)


@dataclasses.dataclass
class Diffusion(Group, prefix="diffusion."):
    """The objective."""

    loss_weight: str = field(
        "uniform", "Weight of the loss at each noise level.", choices="m2m_jax.diffusion.schedule:LOSS_WEIGHTS"
    )
    min_snr_gamma: float = field(
        5.0, "Largest signal-to-noise ratio that counts; read by loss_weight=min_snr.", low=1e-6
    )
    context_dropout: float = field(
        0.1, "Probability that a set trains without its context or caption, which guidance needs.", low=0, high=1
    )
    clean_timestep: int = field(0, "Timestep that the network is told for clean images.", low=0)


@dataclasses.dataclass
class Optimizer(Group, prefix="optimizer."):
    """AdamW."""

    learning_rate: float = field(
        3e-4, "Learning rate after the warm-up; a cosine to zero over train.steps follows.", low=0
    )
    warmup_steps: int = field(100, "Steps over which the learning rate grows from zero.", low=0)
    weight_decay: float = field(0.01, "Weight decay of kernels; other parameters have none.", low=0)
    clip_norm: float = field(1.0, "Gradients are scaled down to this global norm.", low=1e-12)
    b1: float = field(0.9, "Decay of the average of gradients.", low=0, high=0.999999)
    b2: float = field(0.999, "Decay of the average of squared gradients.", low=0, high=0.999999)
    attn2_rate: float = field(
        1.0, "Factor on the updates of attn2, to sets or to text, which is new where the rest is pretrained.", low=0
    )


@dataclasses.dataclass
class Train(Group, prefix="train."):
    """The run."""

    parameters: str = field("all", "Parameters that train.", choices="m2m_jax.models.trained:PARAMETERS")
    steps: int = field(10_000, "Training steps of the whole run.", low=1)
    minutes: float = field(
        0.0,
        "Minutes that the run may take, from its start to its last step: as many steps as fit at the speed of the "
        "first, train.steps at most. 0: no limit.",
        low=0,
    )
    log_every: int = field(20, "Steps between lines of the log.", low=1)
    accumulation: int = field(1, "Parts that a batch is computed in, one after another, to save memory.", low=1)
    reduce_dtype: str = field(
        "model",
        "Precision in which devices sum gradients: model.dtype, or float32, at twice the traffic of bfloat16.",
        choices=("model", "float32"),
    )
    on_nonfinite: str = field(
        "stop",
        "What to do about a step whose loss or gradient is not finite, and which changes nothing in any case: stop the "
        "run, skip the step, or rollback: go back to the last checkpoint and leave out the batches up to here.",
        choices=("stop", "skip", "rollback"),
    )
    ema_decay: float = field(
        0.999,
        "Decay of the average of parameters, which is sampled from: min(ema_decay, (1 + step) / (10 + step)).",
        low=0,
        high=0.999999,
    )


@dataclasses.dataclass
class Eval(Group, prefix="eval."):
    """Evaluations while training."""

    every: int = field(1_000, "Steps between evaluations; the last step is evaluated in any case.", low=1)
    batches: int = field(4, "Batches in each evaluation.", low=1)
    batch_size: int = field(16, "Sets in a batch, over all processes; each serves another as foreign context.", low=2)
    augment: bool = field(True, "Whether held-out sets are augmented, too, as data.augment says.")
    metrics: tuple[str, ...] = field(
        (), "Figures that are computed beside those of the task.", choices="m2m_jax.tasks.metrics:METRICS"
    )
    score: str = field(
        "task",
        "What checkpoint.keep_best judges by: the task's own score, or that of one of eval.metrics.",
        choices="m2m_jax.tasks.metrics:METRICS",
        also=("task",),
    )
    generate_every: int = field(
        0, "Steps between scores of generated sets, eval.metrics=generated; a multiple of eval.every; 0: none.", low=0
    )
    generate_sets: int = field(256, "Held-out sets that are continued for them; at most as many as there are.", low=4)
    generate_given: int = field(0, "Images of each that are given, of data.images_per_set; 0: half of them.", low=0)
    generate_encoder: str = field("pixels", "What judges them: NAME or NAME=FOLDER, as --encoders of m2m_jax.score.")
    generate_scores: tuple[str, ...] = field(
        ("mind", "similarity", "copy", "drift"),
        "What is measured, as --scores of m2m_jax.score; eval.score=generated judges by the first figure of the first.",
    )

    def check(self) -> None:
        if ("generated" in self.metrics) != (self.generate_every > 0):
            raise UserError(
                f"config.eval.metrics is {self.metrics} and config.eval.generate_every is {self.generate_every}: "
                "generated sets need both, generated among the metrics and a number of steps"
            )
        if self.generate_every % self.every:
            raise UserError(
                f"config.eval.generate_every is {self.generate_every}; it must be a multiple of config.eval.every, "
                f"{self.every}"
            )
        if self.score == "task":
            return
        if self.score not in self.metrics:
            raise UserError(f"config.eval.score is {self.score}; set --config.eval.metrics={self.score}, too")
        if not hasattr(chosen(self, "score"), "score"):
            raise UserError(f"config.eval.score is {self.score}, a metric that ranks nothing: it has no score")


@dataclasses.dataclass
class Sample(Group, prefix="sample."):
    """The sample grids, and the sampler's defaults."""

    steps: int = field(25, "Denoising steps of an image.", low=1)
    stepper: str = field(
        "dpmpp_2m",
        "Solver that goes from one noise level to the next.",
        choices="m2m_jax.diffusion.step_tables:STEPPERS",
    )
    guidance: str = field(
        "cfg",
        "Which conditions are weighed against one another to exaggerate their effect.",
        choices="m2m_jax.diffusion.guidance:GUIDANCES",
    )
    guidance_scale: float = field(1.5, "How far the effect of the context is exaggerated; 1: not at all.", low=0)
    guidance_options: tuple[str, ...] = field((), "Further numbers of the guidance, each as NAME=NUMBER.")


@dataclasses.dataclass
class Checkpoint(Group, prefix="checkpoint."):
    """Checkpoints."""

    every: int = field(1_000, "Steps between checkpoints; the last step is saved in any case.", low=1)
    keep: int = field(2, "How many of the newest checkpoints are kept.", low=1)
    keep_every: int = field(0, "Checkpoints at multiples of so many steps are kept for ever; 0: none.", low=0)
    keep_best: int = field(1, "How many of the checkpoints with the best evaluations are kept.", low=0)
    fallback: bool = field(False, "Whether to resume from the newest whole checkpoint where the newest is damaged.")


@dataclasses.dataclass
class Profile(Group, prefix="profile."):
    """The profiler."""

    steps: tuple[int, int] = field(
        (0, 0), "First and last step of a profiler trace, written to WORKDIR/profile; (0, 0): no trace.", low=0
    )

    def check(self) -> None:
        first, last = self.steps
        if first > last or (first < 1 and last > 0):
            raise UserError(
                f"config.profile.steps is {self.steps}; it must be a first and a last step, or (0, 0) for none"
            )


@dataclasses.dataclass
class Mesh(Group, prefix="mesh."):
    """Devices along each axis; -1: all that are left."""

    slice: int = field(
        1, "Copies of all, one for each TPU slice or node of GPUs, which only a slow network connects.", low=-1
    )
    data: int = field(-1, "Devices that hold copies of the parameters, or of their shares.", low=-1)
    fsdp: int = field(1, "Devices that share every kernel; it is gathered for its use.", low=-1)
    tensor: int = field(1, "Devices that share attention heads and channels.", low=-1)
    context: int = field(1, "Devices that share the rows of every image.", low=-1)

    def check(self) -> None:
        for axis in fields_of(Mesh):
            if not getattr(self, axis):
                raise UserError(f"config.mesh.{axis} is 0; it must be positive, or -1 for all that are left")


@dataclasses.dataclass
class Config(Group):
    """A configuration.

    Example:
        config = default_config()
        config.train.steps = 100
        config.update({"data.image_size": 64, "sample.stepper": "ddim"})
        validate(config)  # m2m_jax.config_rules
    """

    task: str = field("set_diffusion", "What is trained.", choices="m2m_jax.tasks.registry:TASKS")
    seed: int = field(0, "Seed of the initial parameters, the order of the data and all noise.", low=0)
    data: Data = dataclasses.field(default_factory=Data)
    autoencoder: Autoencoder = dataclasses.field(default_factory=Autoencoder)
    model: Model = dataclasses.field(default_factory=Model)
    image_encoder: ImageEncoder = dataclasses.field(default_factory=ImageEncoder)
    text_encoder: TextEncoder = dataclasses.field(default_factory=TextEncoder)
    init: Init = dataclasses.field(default_factory=Init)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    train: Train = dataclasses.field(default_factory=Train)
    eval: Eval = dataclasses.field(default_factory=Eval)
    sample: Sample = dataclasses.field(default_factory=Sample)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    profile: Profile = dataclasses.field(default_factory=Profile)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def check(self) -> None:
        if self.diffusion.clean_timestep >= self.schedule.num_train_timesteps:
            raise UserError(
                f"config.diffusion.clean_timestep is {self.diffusion.clean_timestep}; it must be less than "
                f"config.schedule.num_train_timesteps = {self.schedule.num_train_timesteps}"
            )


def default_config() -> Config:
    """Return a config with every field at its default."""
    return Config()


def apply_preset(config: Config, preset: str, presets: Mapping[str, Mapping[str, Any]]) -> Config:
    """Set the fields `{dotted name: value}` of `presets[preset]`, and return the config; '' changes nothing.

    Raises:
      UserError: there is no such preset, or no such field.
    """
    if not preset:
        return config
    if preset not in presets:
        known = ", ".join(f":{name}" for name in presets)
        raise UserError(f"unknown preset {preset!r}{nearest(preset, presets)}; this config has {known}")
    config.update(presets[preset])
    return config


def reads_latents(data: Data) -> bool:
    """Say whether batches hold latents, for which no step runs the autoencoder."""
    return data.latents or getattr(chosen(data, "name"), "gives_latents", False)


def build(cls: type[T], group: Group, **others: Any) -> T:
    """Return a `cls`, a dataclass, whose fields are those of the same name in a group of a config.

    Fields of one of them alone are left out: the dataclass has defaults for its own.

    Args:
      others: further fields, and values that stand before the group's.

    Raises:
      UserError: the fields make no `cls`.
    """
    known = fields_of(type(group))
    fields = {one.name: getattr(group, one.name) for one in dataclasses.fields(cls) if one.name in known}
    try:
        return cls(**(fields | others))
    except UserError as error:
        raise UserError(f"config.{group.prefix[:-1]}: {error}") from error


def to_json(config: Group) -> dict[str, Any]:
    """Return a config as a dict that `json` can write: tuples are lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def from_json(values: Mapping[str, Any]) -> Config:
    """Return the config that `to_json` wrote. Fields that were added since then keep their defaults.

    Raises:
      UserError: it has fields that are none of today's, or values of other types.
    """
    config = default_config()
    _fill(config, values)
    return config


def _fill(group: Group, values: Mapping[str, Any]) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"config.{group.prefix}: a group of fields, not {values!r:.60}")
    known = fields_of(type(group))
    for name, value in values.items():
        if name not in known and name not in group.formerly:
            error = unknown_field(group.name_of(name), names_of(Config))
            raise UserError(f"a config of another version, or damaged: {error}")
        if name in known and known[name].is_group:
            _fill(getattr(group, name), value)
        else:
            setattr(group, name, value)
