"""A global channel of one's own: an embedder and a data source that are defined here; trained, evaluated, sampled with
and exported."""

import dataclasses
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_fixtures import data_config, write_image_folder
from model_fixtures import quick_jit, random_params
from PIL import Image
from run_fixtures import config_argument, load_config, make_autoencoder, run

from m2m_jax.attention.layout import SetLayout
from m2m_jax.config_rules import validate
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import merge
from m2m_jax.data import pipeline
from m2m_jax.data.records import ImageSetRecord
from m2m_jax.diffusion.guidance import EVERYTHING
from m2m_jax.models.context_cache import denoise_next
from m2m_jax.models.embedders import EMBEDDERS, Perceptron
from m2m_jax.models.unet import denoise_sets
from m2m_jax.sampling.bundle import Bundle
from m2m_jax.sampling.bundle_writer import write_bundle
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.tasks.evaluation import context_errors
from m2m_jax.tasks.set_diffusion import SetDiffusion

SETS, IMAGES, SIZE = 2, 3, 16
RNG = np.random.default_rng(0)
LATENTS, NOISE = (RNG.standard_normal((SETS, IMAGES, 4, 4, 4)).astype(np.float32) for _ in range(2))
TIMESTEP = RNG.integers(200, 800, (SETS, IMAGES), np.int32)
SHADES = RNG.standard_normal((SETS, 2 * IMAGES, 2)).astype(np.float32)
CONTEXT = RNG.integers(0, 256, (SETS, 2, SIZE, SIZE, 3), np.uint8)


def _png(grey):
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (grey,) * 3).save(file, "PNG")
    return file.getvalue()


class ShadeEmbedder(Perceptron):
    """Two numbers."""

    width = 2

    def __init__(self, time_embed_dim, *, rngs):
        super().__init__(2, time_embed_dim, rngs=rngs)


class ShadeRecords(pipeline.RecordSource):
    """Sets of four grey images that know how light they are."""

    def __init__(self, split: str):
        self.name, self.kinds, self.num_images = f"shades ({split})", ["shades"] * 8, [4] * 8
        self.attributes = {"shade": 2}

    def __getitem__(self, index: int) -> ImageSetRecord:
        grey_n = np.random.default_rng(index).integers(0, 256, 4)
        images = tuple(_png(int(grey)) for grey in grey_n)
        shade = np.stack([grey_n / 255, 1 - grey_n / 255], axis=1).astype(np.float32)
        return ImageSetRecord(f"shade{index}", "shades", "", images=images, attributes={"shade": shade})


class Shades(pipeline.DataSource):
    """Sets of grey images."""

    needs_path = False

    @classmethod
    def open(cls, config, split):
        return ShadeRecords(split)


@pytest.fixture(autouse=True, scope="module")
def registered():
    EMBEDDERS.register("shade")(ShadeEmbedder)
    pipeline.SOURCES.register("shades")(Shades)
    yield
    for registry, name in ((EMBEDDERS, "shade"), (pipeline.SOURCES, "shades")):
        for table in (registry._registered, registry._by):
            table.pop(name, None)


CHANGES = {
    "data.name": "shades",
    "data.image_size": SIZE,
    "data.images_per_set": IMAGES,
    "data.augment.enabled": False,
    "model.block_out_channels": (16,),
    "model.down_block_types": ("DownBlock2D",),  # one transformer, in the middle
    "model.num_attention_heads": (2,),
    "model.norm_num_groups": 4,  # a group of one channel would take away what is added to it
    "model.global_embeddings": ("shade",),
    "train.steps": 4,  # the last layers of network and embedder begin at zero
    "optimizer.warmup_steps": 1,
    "eval.every": 4,
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return make_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def task(registered, autoencoder):
    config = load_config("emoji:tiny")
    config.update({**CHANGES, "autoencoder.path": str(autoencoder)})
    validate(config)
    return SetDiffusion(config)


@pytest.fixture(scope="module")
def flags(registered, autoencoder):
    changes = {**CHANGES, "autoencoder.path": autoencoder}
    return [config_argument("emoji:tiny"), *(f"--config.{name}={value}" for name, value in changes.items())]


@pytest.fixture(scope="module")
def workdir(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    result = run("train", *flags, f"--workdir={workdir}")
    assert result.code == 0, result.err
    return workdir


@pytest.fixture(scope="module")
def sampler(workdir):
    """Of the run, at random weights, in which values and context matter."""
    trained = Sampler.from_checkpoint(workdir, cache_size=4)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained.unet_params)
    return dataclasses.replace(trained, unet_params=random_params(shapes))


def _changed(values, *place):
    changed = values.copy()
    changed[place] += 1.5
    return changed


def _distance(a, b):
    """[images], of images [sets, images, ...]."""
    return np.abs(a.astype(np.float32) - b.astype(np.float32)).max(axis=(0, *range(2, a.ndim)))


def test_a_run_trains_it_and_shows_samples(workdir):
    trained = Sampler.from_checkpoint(workdir)
    assert trained.global_widths == {"shade": 2}
    assert np.any(trained.unet_params["global_embedders.shade.linear_2.kernel"])
    assert (workdir / "samples" / "0000004.png").exists()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert any("eval/loss_other_context" in json.loads(line) for line in lines)


def test_programs_read_them_of_the_data_or_say_what_is_missing(workdir, flags, tmp_path):
    table = tmp_path / "table.json"
    evaluate = ["evaluate", *flags, f"--checkpoints={workdir}", "--batches=1", f"--output={table}"]
    other = run(
        *evaluate,
        f"--config.data.path={write_image_folder(tmp_path / 'sets', num_sets=8, images_per_set=4)}",
        "--config.data.name=folder",
        "--split=train",
    )
    assert other.code == 2 and "told shade of every image, 2 numbers" in other.err
    result = run(*evaluate)
    assert result.code == 0, result.err
    assert json.loads(table.read_text())["runs"][str(workdir)]["loss_own_context"][0] > 0
    result = run("sample", f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "this model is told of each image: shade" in result.err


def test_the_error_of_an_image_does_not_depend_on_values_of_later_ones(task):
    params = random_params(task.shapes)
    draws = types.SimpleNamespace(noise_bnhwc=NOISE, timestep_bn=TIMESTEP, keep_context_b=np.ones(SETS, bool))

    @quick_jit
    def errors(shade_bnc):
        batch = {"latents_bnhwc": LATENTS, "attribute_shade_bnc": shade_bnc}
        return task.errors(params, task.frozen, batch, draws)

    values = SHADES[:, :IMAGES]
    error_bn = np.asarray(errors(values))
    for i in range(IMAGES):
        change_n = _distance(np.asarray(errors(_changed(values, slice(None), i))), error_bn)
        # Itself, and those that see it among their context.
        assert not change_n[:i].any() and (change_n[i:] > 1e-4).all()


def test_values_go_with_the_context_and_the_image_being_made_keeps_its_own(task):
    params, same = random_params(task.shapes), np.broadcast_to(LATENTS[:1], LATENTS.shape)

    @quick_jit
    def errors(shade_bnc):
        return context_errors(
            merge(task.unet, params),
            task.schedule,
            jnp.asarray(same),
            jnp.asarray(same[:, :-1]),
            record_b=jnp.arange(SETS),
            seed=0,
            batch_index=jnp.int32(0),
            clean_timestep=0,
            globals_bnc={"shade": shade_bnc},
        )

    alike = np.broadcast_to(SHADES[:1, :IMAGES], (SETS, IMAGES, 2))
    of_last, of_first = errors(_changed(alike, 1, IMAGES - 1)), errors(_changed(alike, 1, 0))
    np.testing.assert_array_equal(of_last["loss_other_context"], of_last["loss_own_context"])
    own_b, other_b = of_first["loss_own_context"], of_first["loss_other_context"]
    assert (np.abs(own_b - other_b) > 1e-4).all()


def test_the_cache_is_exact(task, sampler):
    static, params = sampler.static, sampler.params
    steps = np.float32(500)

    @quick_jit
    def both(shade_bnc):
        seed_b, every = jnp.arange(SETS, dtype=jnp.uint32), jnp.ones(SETS, bool)
        cache = static.empty_cache(params, seed_b)
        for i in range(IMAGES - 1):
            cache = static.append(params, cache, seed_b, LATENTS[:, i], every, {"shade": shade_bnc[:, i]})
        unet, of_next = merge(task.unet, params["unet"]), {"shade": shade_bnc[:, -1]}
        cached_bghwc = denoise_next(unet, NOISE[:, -1], steps, [EVERYTHING], cache=cache, globals_bc=of_next)
        inputs = LATENTS[:, :-1], NOISE[:, -1:], jnp.full((SETS, 1), steps), SetLayout.sampling(IMAGES - 1)
        told = {"clean_timestep": static.clean_timestep, "globals_bq": {"shade": shade_bnc}}
        return cached_bghwc, denoise_sets(unet, *inputs, **told)

    outputs = [both(SHADES[:, :IMAGES]), both(_changed(SHADES[:, :IMAGES], slice(None), 0))]
    for cached_bghwc, together_bnhwc in outputs:
        np.testing.assert_allclose(cached_bghwc, together_bnhwc, rtol=1e-5, atol=1e-5)
    assert np.abs(outputs[0][0] - outputs[1][0]).max() > 0.01


def test_an_image_is_made_by_its_value_and_those_before_it(sampler):
    seeds = np.arange(SETS)

    def sample(values):
        return sampler.sample_sets(list(CONTEXT), 2, seeds, globals={"shade": values})

    values = SHADES[:, :4]
    images = sample(values)
    assert images.shape == (SETS, 2, SIZE, SIZE, 3)
    every = slice(None)
    assert (_distance(sample(_changed(values, every, 0)), images) > 0).all()
    assert (_distance(sample(_changed(values, every, 2)), images) > 0).all()
    of_last = _distance(sample(_changed(values, every, 3)), images)
    assert of_last[0] == 0 and of_last[1] > 0
    # A set of another size beside it changes nothing.
    other = sampler.sample_sets([CONTEXT[0, :0], CONTEXT[1]], 2, seeds, globals={"shade": [values[0, :2], values[1]]})
    assert _distance(other[1:], images[1:]).max() <= 1
    alone = sampler(CONTEXT[1], 2, seed=1, globals={"shade": values[1]})
    assert _distance(alone[None], images[1:]).max() <= 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, r"told of each image: shade; and values are given of: nothing"),
        ({"shade": SHADES[:, :4], "camera": SHADES}, "values are given of: camera, shade"),
        ({"shade": SHADES[:1, :4]}, r"globals\['shade'\] has values of 1 sets, not of 2"),
        ({"shade": SHADES[:, :3]}, r"globals\['shade'\]\[0\] must hold 2 finite numbers of each of 4 images"),
        ({"shade": np.float32("nan") * SHADES[:, :4]}, r"must hold 2 finite numbers"),
    ],
)
def test_values_that_are_not_those_it_is_told_are_refused(sampler, values, words):
    with pytest.raises(UserError, match=words) as refused:
        sampler.sample_sets(list(CONTEXT), 2, np.arange(SETS), globals=values)
    assert "\n" not in str(refused.value)


def test_a_bundle_takes_them_too(sampler, tmp_path):
    write_bundle(sampler, tmp_path)
    bundle = Bundle(tmp_path)
    assert bundle.global_widths == {"shade": 2}
    arguments, values = (list(CONTEXT), 2, np.arange(SETS)), {"shade": SHADES[:, :4]}
    difference = _distance(
        bundle.sample_sets(*arguments, globals=values), sampler.sample_sets(*arguments, globals=values)
    )
    assert difference.max() <= 1
    with pytest.raises(UserError, match="told of each image: shade"):
        bundle.sample_sets(*arguments)


def test_data_without_the_values_are_refused_at_the_start():
    def examples(**widths):
        config = data_config(name="shades", images_per_set=IMAGES)
        return pipeline.open_examples(config, split="train", seed=0, attributes=widths)

    assert examples(shade=2).num_sets == 8
    with pytest.raises(UserError, match=r"told shade of every image, 3 numbers, and shades \(train\) has 2 numbers"):
        examples(shade=3)
    with pytest.raises(UserError, match=r"has no attribute camera: name other data"):
        examples(camera=3)


def test_the_config_knows_what_is_registered_and_which_task_reads_it():
    config = load_config("emoji:tiny")
    config.model.global_embeddings = ("shades",)
    with pytest.raises(UserError, match=r"config.model.global_embeddings .* did you mean shade"):
        validate(config)
    config = load_config("emoji_t2i:tiny")
    config.model.global_embeddings, config.text_encoder.path = ("shade",), "somewhere"
    with pytest.raises(UserError, match="task=text_to_image is told of captions alone"):
        validate(config)
