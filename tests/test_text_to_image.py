"""Images from captions: parity with diffusers' pipeline, what noise depends on, folders, training and its sampler."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from data_fixtures import build_emoji
from parity_fixtures import change_config
from run_fixtures import config_argument, load_config, make_autoencoder, run
from text_fixtures import CLIP_LENGTH, SAMPLE_SIZE, SD_AUTOENCODER, make_bert, make_stable_diffusion

from m2m_jax.core.errors import UserError
from m2m_jax.core.keys import Domain, domain_key
from m2m_jax.models.tokenizer import Tokenizer, load_tokenizer
from m2m_jax.sampling.programs import INITIAL
from m2m_jax.sampling.text_to_image import TextToImage
from m2m_jax.tasks.text_to_image import TextToImageTask
from m2m_jax.training.workload import count_model_flops

CAPTIONS = ["a red cat", "dog, blue"]
SETTINGS = {"stepper": "ddim", "steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def generator(folder):
    return TextToImage.open(folder, devices=jax.devices()[:1], **SETTINGS)


def noise(seed: int, index: int, image: int) -> np.ndarray:
    """What an image starts from."""
    key = jax.random.fold_in(jax.random.fold_in(domain_key(Domain.TEXT_TO_IMAGE, seed), index), image)
    shape = (SAMPLE_SIZE, SAMPLE_SIZE, SD_AUTOENCODER.latent_channels)
    return np.asarray(jax.random.normal(jax.random.split(key, 3)[INITIAL], shape))


def test_a_stable_diffusion_folder_has_parity_with_diffusers_pipeline(folder, transformers):
    """The same folder, captions and noise: tokenizer, text encoder, guidance, stepper and decoder at once."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start_bhwc = np.stack([noise(5, index, 3) for index in (7, 9)])
    theirs = pipeline(
        CAPTIONS,
        latents=torch.from_numpy(start_bhwc.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="latent",
    ).images.numpy()
    ours = TextToImage.open(folder, devices=jax.devices()[:1], **SETTINGS)
    latents_bnhwc, images_bnhwc = ours.generate(CAPTIONS, [7, 9], [3], seed=5)
    assert images_bnhwc.shape == (2, 1, 16, 16, 3) and images_bnhwc.dtype == np.uint8
    expected = theirs.transpose(0, 2, 3, 1)
    assert np.abs(latents_bnhwc[:, 0] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_image_depends_on_seed_caption_and_numbers_alone(generator):
    together = np.asarray(generator.generate(CAPTIONS, [7, 9], [0, 1, 2], seed=5)[0])
    swapped = np.asarray(generator.generate(CAPTIONS[::-1], [9, 7], [2, 1, 0], seed=5)[0])
    np.testing.assert_array_equal(together, swapped[::-1, ::-1])
    other = np.asarray(generator.generate(CAPTIONS, [7, 9], [0, 1, 2], seed=6)[0])
    assert np.abs(together - other).min(axis=(2, 3, 4)).max() > 0
    flat = together.reshape(6, -1)
    assert len(np.unique(flat, axis=0)) == 6


def test_devices_share_the_captions_and_change_nothing(folder, generator):
    four = TextToImage.open(folder, devices=jax.devices()[:4], **SETTINGS)
    captions, index_b = CAPTIONS * 2, [7, 9, 1, 2]
    found = four.generate(captions, index_b, [0, 1], seed=5)[1]
    for i in range(4):
        alone = generator.generate(captions[i : i + 1], index_b[i : i + 1], [0, 1], seed=5)[1]
        np.testing.assert_array_equal(alone[0], found[i])
    assert four.about == generator.about


def test_what_is_generated_depends_on_is_told(folder, generator):
    other = TextToImage.open(folder, devices=jax.devices()[:1], **SETTINGS | {"guidance_scale": 2.0})
    assert other.about != generator.about
    assert json.loads(json.dumps(generator.about))["weights"].keys() == {
        *("autoencoder", "text_encoder", "tokenizer", "unet")
    }


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"])
def test_a_missing_part_is_named(part, folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "pipeline")
    shutil.rmtree(there / part) if (there / part).is_dir() else (there / part).unlink()
    with pytest.raises(UserError, match=part):
        TextToImage.open(there, **SETTINGS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 30}, "image_size is 30; the autoencoder and a U-Net of 2 levels need a multiple of 4"),
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"stepper": "heun"}, "heun"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": 0.0}, "guidance_scale is 0.0, which takes the caption away: 1 is no guidance"),
    ],
)
def test_options_that_make_no_images_are_refused(options, words, folder):
    with pytest.raises(UserError, match=words):
        TextToImage.open(folder, **SETTINGS | options)


@pytest.mark.parametrize(
    ("stepper", "given", "spacing"),
    [("ddim", None, "leading"), ("euler", None, "linspace"), ("euler", "trailing", "trailing")],
)
def test_what_a_schedule_does_not_say_is_as_in_the_pipeline(stepper, given, spacing, folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "pipeline")
    values = json.loads((there / "scheduler" / "scheduler_config.json").read_text())
    del values["steps_offset"], values["timestep_spacing"]
    values |= {"timestep_spacing": given} if given else {}
    (there / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    schedule = TextToImage.open(there, **SETTINGS | {"stepper": stepper}).about["schedule"]
    assert (schedule["timestep_spacing"], schedule["steps_offset"]) == (spacing, 1)


@pytest.mark.parametrize(("version", "image_size"), [("0.8.0.dev0", 128), ("0.10.2", 16), (None, 16)])
def test_old_unets_say_half_of_their_size(version, image_size, folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "pipeline")
    change_config(there / "unet", **({"_diffusers_version": version} if version else {}))
    assert TextToImage.open(there, **SETTINGS).image_size == image_size


def test_a_pipelines_text_encoder_finds_its_tokenizer(folder):
    found = load_tokenizer(str(folder / "text_encoder"), CLIP_LENGTH)
    assert found.text == load_tokenizer(str(folder / "tokenizer"), CLIP_LENGTH).text


def test_a_damaged_schedule_is_refused(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "pipeline")
    (there / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": "many"}')
    with pytest.raises(UserError, match=r"scheduler_config\.json is damaged"):
        TextToImage.open(there, **SETTINGS)


def test_another_pipeline_and_parts_of_two_models_are_refused(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "pipeline")
    text = json.loads((there / "text_encoder" / "config.json").read_text())
    make_bert(tmp_path / "bert")
    index = json.loads((there / "model_index.json").read_text())
    (there / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(UserError, match="is a StableDiffusionXLPipeline"):
        TextToImage.open(there)
    (there / "model_index.json").write_text(json.dumps(index))
    (there / "text_encoder" / "config.json").write_text(json.dumps(text | {"hidden_size": 24}))
    with pytest.raises(UserError, match="of two models"):
        TextToImage.open(there)


# --- Tokenizers -----------------------------------------------------------------------------------------------------


def test_ids_have_parity_with_transformers(folder, transformers):
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    captions = ["", "a red cat", "Red, RED cat " * 9]
    expected = theirs(captions, padding="max_length", truncation=True, max_length=CLIP_LENGTH)["input_ids"]
    tokenizer = load_tokenizer(str(folder / "tokenizer"), CLIP_LENGTH)
    np.testing.assert_array_equal(tokenizer(captions), expected)
    np.testing.assert_array_equal(Tokenizer(tokenizer.text)(captions), expected)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(UserError, match="not a tokenizer of this project"):
        Tokenizer(text)


def test_code_beside_a_tokenizer_is_not_run(folder, tmp_path):
    there = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (there / "evil.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Evil: pass\n")
    values = json.loads((there / "tokenizer_config.json").read_text())
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (there / "tokenizer_config.json").write_text(json.dumps(values | evil))
    with contextlib.suppress(UserError):
        load_tokenizer(str(there), CLIP_LENGTH)
    assert not (tmp_path / "was run").exists()


# --- Training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny run of text-to-image."""
    directory = tmp_path_factory.mktemp("t2i")
    arguments = (
        config_argument("emoji_t2i:tiny"),
        f"--config.data.directory={build_emoji(tmp_path_factory)}",
        f"--config.autoencoder.path={make_autoencoder(directory / 'vae')}",
        f"--config.text_encoder.path={make_bert(directory / 'bert')}",
        "--config.text_encoder.max_tokens=9",
    )
    result = run("train", *arguments, "--workdir", directory / "run")
    assert result.code == 0, result.err
    return directory / "run"


def test_a_run_trains_and_its_checkpoint_generates(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/loss_own_caption" in line for line in lines)
    generator = TextToImage.open(run_folder, devices=jax.devices()[:2])
    images_bnhwc = np.asarray(generator.generate(CAPTIONS, [0, 1], [0, 1, 2], seed=0)[1])
    assert images_bnhwc.shape == (2, 3, 32, 32, 3)
    assert images_bnhwc.std() > 0


def test_a_run_of_another_task_generates_nothing(run_folder):
    result = run("sample", f"--checkpoint={run_folder}", f"--output={run_folder.parent / 'out'}")
    assert result.code == 2 and "samples no sets" in result.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample.stepper": "heun"}, "heun"),
        ({"sample.steps": 1001}, "1001"),
        ({"data.image_size": 36}, "image_size is 36; the autoencoder and a U-Net of 2 levels need a multiple of 8"),
    ],
)
def test_what_makes_no_sample_is_refused_before_training(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        TextToImageTask(tiny_config(tmp_path, **changes))


def tiny_config(folder, **changes):
    config = load_config("emoji_t2i:tiny")
    config.update(changes)
    config.autoencoder.path, config.text_encoder.path = (
        str(make(folder / name)) for make, name in ((make_autoencoder, "vae"), (make_bert, "bert"))
    )
    config.text_encoder.max_tokens = 9
    return config


def test_flops_are_those_of_attention_to_captions(tmp_path):
    """As the log of a run on an accelerator has them: twice as many images, twice as many."""
    config = tiny_config(tmp_path)
    flops = count_model_flops(config)
    config.data.images_per_set = 2
    assert count_model_flops(config) == pytest.approx(2 * flops, rel=0.1)


def test_task_and_attention_go_together(tmp_path):
    for argument in ("--config.model.attn2=image_set", "--config.text_encoder.path=", "--config.task=set_diffusion"):
        result = run("train", config_argument("emoji_t2i:tiny"), argument, "--workdir", tmp_path / "run")
        assert result.code == 2 and "text_to_image" in result.err, argument
        assert not (tmp_path / "run").exists()
