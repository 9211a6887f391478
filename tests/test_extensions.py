"""All that may be added, defined here and used by one run at once: it trains, is judged, resumes from its checkpoint's
description and is sampled. CONTRIBUTING.md says where each of these stands when it is not in a test.

By itself a source is tested in test_data_sources.py, a stepper and guidances in test_guided_sampling.py, an attention
and an embedder in test_conditioning.py, an adapter in test_trained_parameters.py, a text encoder in
test_text_encoders.py.
"""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_runs import saved_arrays
from flax import nnx
from PIL import Image
from run_fixtures import config_argument, make_autoencoder, run

from m2m_jax.attention.plain import attend
from m2m_jax.checkpoints.saved_model import FOLDER, read_about
from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.data.records import ImageSetRecord
from m2m_jax.data.source import SOURCES, DataSource, RecordSource
from m2m_jax.diffusion.guidance import EVERYTHING, GUIDANCES, NOTHING, GuidanceTable
from m2m_jax.diffusion.step_tables import STEPPERS
from m2m_jax.models.attentions import ATTENTIONS, Attention
from m2m_jax.models.embedders import EMBEDDERS, Perceptron
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.image_encoders import IMAGE_ENCODERS, ImageEncoder
from m2m_jax.models.trained import PARAMETERS, Trained
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.tasks.metrics import METRICS, Metric

CALLED = set()  # what is run on the host, once


class Turns(DataSource):
    """Sets of nearly one colour; each image knows its number."""

    needs_path = False

    @classmethod
    def open(cls, config, split):
        return TurnRecords(split)


class TurnRecords(RecordSource):
    def __init__(self, split):
        self.name, self.kinds, self.num_images = f"turns ({split})", ["turns"] * 12, [3] * 12
        self.attributes, self.fingerprint = {"turn": 1}, split

    def __getitem__(self, index):
        images = []
        for number in range(3):
            written = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * index, 80 * number, 99)).save(written, "png")
            images.append(written.getvalue())
        turn = {"turn": np.arange(3, dtype=np.float32)[:, None]}
        return ImageSetRecord(f"turn{index}", "turns", "", images=tuple(images), attributes=turn)


class Spread(Metric):
    """How far latents lie apart, by set, and how far generated colours do."""

    def evaluate(self, params, frozen, batch, batch_index):
        return {"latent_spread": jnp.std(self.task.latents(frozen, batch), axis=(1, 2, 3, 4))}

    def judge(self, samples):
        return {"colour_spread": samples["generated_bnhwc"].std()}

    def score(self, means):
        return -means["eval/colour_spread"]


def half_ddim(schedule, num_steps):
    CALLED.add("stepper")
    return STEPPERS["ddim"](schedule, num_steps)


def doubled(noise_s, *, scale=1.0):
    CALLED.add("guidance")
    return GuidanceTable((EVERYTHING, NOTHING), np.tile([2 * scale, 1 - 2 * scale], (len(noise_s), 1)))


class Turn(Perceptron):
    width = 1

    def __init__(self, time_embed_dim, *, rngs):
        super().__init__(1, time_embed_dim, rngs=rngs)


class Memory(Attention):
    """Attention to tokens that the network has learnt."""

    def __init__(self, channels, num_heads, config, *, dtype, rngs):
        super().__init__(channels, num_heads, dtype=dtype, rngs=rngs)
        self.tokens = nnx.Param(nnx.initializers.normal()(rngs.params(), (6, channels)))

    def __call__(self, x_btc, conditioning, address):
        tokens_bsc = jnp.broadcast_to(self.tokens[...][None], (x_btc.shape[0], *self.tokens.shape))
        k_bshd, v_bshd = self.heads(self.to_k(tokens_bsc)), self.heads(self.to_v(tokens_bsc))
        return self.output(attend(self.heads(self.to_q(x_btc)), k_bshd, v_bshd), x_btc.shape), (k_bshd, v_bshd)


def low_rank(key, params):
    kernels = {name: x for name, x in params.items() if name.endswith("to_q.kernel")}
    down = {f"adapter.down.{name}": jnp.ones((x.shape[0], 1)) for name, x in kernels.items()}
    return down | {f"adapter.up.{name}": jnp.zeros((1, x.shape[1])) for name, x in kernels.items()}


def merge(params):
    own = {name: x for name, x in params.items() if not name.startswith("adapter.")}
    for name in [name for name in params if name.startswith("adapter.up.")]:
        kernel = name.removeprefix("adapter.up.")
        own[kernel] = own[kernel] + params[f"adapter.down.{kernel}"] @ params[name]
    return own


@dataclasses.dataclass(frozen=True)
class PatchesConfig:
    hidden_size: int = 8
    patch_size: int = 8


class Patches(nnx.Module):
    """A token is a linear map of a patch."""

    def __init__(self, config, *, rngs):
        patch = (config.patch_size,) * 2
        self.patches = nnx.Conv(3, config.hidden_size, patch, strides=patch, padding="VALID", rngs=rngs)

    def __call__(self, images_bhwc):
        return jax.lax.collapse(self.patches(images_bhwc), 1, 3)


def num_patches(config, size):
    if size % config.patch_size:
        raise UserError("it must be a multiple of 8")
    return (size // config.patch_size) ** 2


def resized(images_bhwc, size):
    return jax.image.resize(images_bhwc, (len(images_bhwc), size, size, 3), "linear")


KERNEL = np.random.default_rng(0).standard_normal((8, 8, 3, 8)).astype(np.float32) / 14
PATCHES = ImageEncoder(
    *(PatchesConfig, Patches, lambda folder, layer, dtype: PatchesConfig()),
    lambda folder: {"patches.kernel": KERNEL, "patches.bias": np.zeros(8, np.float32)},
    *(num_patches, resized),
)
ADDED = (
    (SOURCES, "turns", Turns),
    (METRICS, "spread", Spread),
    (STEPPERS, "half_ddim", half_ddim),
    (GUIDANCES, "doubled", doubled),
    (EMBEDDERS, "turn", Turn),
    (ATTENTIONS, "tokens", Memory),
    (PARAMETERS, "low_rank", Trained(lambda name: True, low_rank, merge)),
    (IMAGE_ENCODERS, "patches", PATCHES),
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """What this file registers is gone after it."""
    for registry, name, thing in ADDED:
        registry.register(name)(thing)
    yield
    for registry, name, _ in ADDED:
        for table in (registry._registered, registry._by):
            table.pop(name)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    (folder / "config.json").write_text(json.dumps({"model_type": "patches"}))
    return folder


@pytest.fixture(scope="module")
def trained(encoder_folder, tmp_path_factory):
    """The workdir of a run that uses all of them."""
    workdir = tmp_path_factory.mktemp("run")
    result = run(
        "train",
        config_argument("emoji:tiny"),
        f"--config.autoencoder.path={make_autoencoder(tmp_path_factory.mktemp('vae'))}",
        "--config.model.block_out_channels=(16,)",
        "--config.model.down_block_types=('DownBlock2D',)",  # one transformer, in the middle
        "--config.model.norm_num_groups=4",  # a group of one channel would take away what is added to it
        "--config.model.num_attention_heads=(2,)",
        "--config.data.name=turns",
        "--config.data.images_per_set=3",
        "--config.data.augment.enabled=False",
        "--config.eval.metrics=spread",
        "--config.eval.score=spread",
        "--config.sample.stepper=half_ddim",
        "--config.sample.guidance=doubled",
        "--config.model.global_embeddings=turn",
        "--config.model.attentions=self,set,tokens",
        "--config.train.parameters=low_rank",
        f"--config.image_encoder.path={encoder_folder}",
        "--config.image_encoder.image_size=16",
        "--config.optimizer.learning_rate=0.05",
        "--config.train.steps=4",
        "--config.eval.every=4",
        "--config.checkpoint.every=4",
        f"--workdir={workdir}",
    )
    assert result.code == 0, result.err
    return workdir


def test_a_run_trains_with_all_of_them(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [line for line in lines if "eval/loss_own_context" in line]
    assert evaluated["eval/latent_spread"] > 0 and evaluated["eval/colour_spread"] > 0
    arrays = saved_arrays(trained, 4)
    for part in ("adapter.up.", ".attn_tokens.tokens", "embedders.turn"):
        assert any(part in name for name in arrays), part
    assert all(np.any(x) for name, x in arrays.items() if name.startswith("ema.adapter.up."))
    assert read_about(trained / FOLDER, 4)["score"] == pytest.approx(-evaluated["eval/colour_spread"])
    assert {"stepper", "guidance"} == CALLED


def test_its_checkpoint_is_sampled(trained):
    sampler = Sampler.from_checkpoint(trained)
    assert (sampler.settings.stepper, sampler.settings.guidance) == ("half_ddim", "doubled")
    assert sampler.models.image_encoder == PatchesConfig() and sampler.models.context_tokens == 4
    contexts = [np.full((m, 32, 32, 3), 90, np.uint8) for m in (2, 1)]

    def sampled(last):
        turn = [np.array([[0], [1], [last]])[:m] for m in (3, 2)]
        turn[1][-1] = 1
        return sampler.sample_sets(contexts, 1, np.array([3, 4]), globals={"turn": turn})

    first, other = sampled(2), sampled(-5)
    assert first.shape == (2, 1, 32, 32, 3)
    assert np.any(first[0] != other[0])
    np.testing.assert_array_equal(first[1], other[1])


def test_an_image_encoder_is_described_and_refuses(encoder_folder, tmp_path):
    config = default_config()
    config.autoencoder.path = str(make_autoencoder(tmp_path / "vae"))
    config.image_encoder.update(path=str(encoder_folder), image_size=16)
    models, _ = FrozenModels.load(config)
    assert models.metadata["image_encoder"]["model_type"] == "patches"
    assert FrozenModels.from_metadata(json.loads(json.dumps(models.metadata))) == models
    config.image_encoder.image_size = 20
    with pytest.raises(UserError, match=r"config.image_encoder.image_size is 20; it must be a multiple of 8"):
        FrozenModels.load(config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    config.image_encoder.path = str(tmp_path)
    with pytest.raises(UserError, match="describes a siglip; image encoders are dinov2 and dinov2_with_registers and"):
        FrozenModels.load(config)


def test_a_score_is_of_a_metric_that_has_one():
    class Silent(Metric):
        """Ranks nothing."""

    config = default_config().eval
    config.score = "spread"
    with pytest.raises(UserError, match=r"config.eval.score is spread; set --config.eval.metrics=spread, too"):
        config.check()
    config.metrics = ("spread",)
    config.check()
    METRICS.register("silent")(Silent)
    try:
        config.update(metrics=("silent",), score="silent")
        with pytest.raises(UserError, match="a metric that ranks nothing"):
            config.check()
    finally:
        for table in (METRICS._registered, METRICS._by):
            table.pop("silent")


def test_two_figures_of_one_name_are_refused():
    from m2m_jax.training.held_out import _joined

    assert _joined({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="name a figure a"):
        _joined({"a": 1}, {"a": 2})
