"""The sampler as a program and from Python."""

import dataclasses
import io
import json
import os
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from data_fixtures import write_image_folder
from PIL import Image
from run_fixtures import ROOT, run, train_tiny

import m2m_jax
from m2m_jax.attention.backends import Backend
from m2m_jax.attention.plain import prefix
from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.models.initialization import is_set_attention
from m2m_jax.sampling.programs import compiled
from m2m_jax.sampling.run_job import step_line
from m2m_jax.sampling.settings import SamplingSettings

SIZE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory).workdir


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of three pictures: RGBA PNG, grey JPEG, WebP."""
    return write_image_folder(tmp_path_factory.mktemp("sets"), num_sets=2, images_per_set=3)


@pytest.fixture(scope="module")
def context_files(sets):
    return sorted((sets / "set00").iterdir())[:2]


@pytest.fixture(scope="module")
def sampler(checkpoint):
    """Of the trained run, shaken: six steps are too few for the context to show."""
    sampler = m2m_jax.Sampler.from_checkpoint(checkpoint)
    rng = np.random.default_rng(0)
    params = {k: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32) for k, x in sampler.unet_params.items()}
    return dataclasses.replace(sampler, unet_params=params)


def _sample(output, *arguments):
    result = run("sample", *arguments, f"--output={output}")
    assert result.code == 0, result.err
    return result.out


def _images(folder):
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png") if path.stem.isdigit()}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, checkpoint, context_files):
    """Three images from two."""
    output = tmp_path_factory.mktemp("out") / "new" / "folder"
    files = ",".join(map(str, context_files))
    printed = _sample(output, f"--checkpoint={checkpoint}", f"--context={files}", "--num_images=3", "--seed=5")
    return output, printed


def test_files(sampled, checkpoint, context_files):
    output, printed = sampled
    names = {"000.png", "001.png", "002.png", "contact_sheet.png", "sample.json"}
    assert {path.name for path in output.iterdir()} == names
    assert [path.name for path in output.parent.iterdir()] == [output.name]  # nothing half-written is left
    assert printed.splitlines()[-1] == str(output / "contact_sheet.png")
    for image in _images(output).values():
        assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
    record = json.loads((output / "sample.json").read_text())
    seconds = record.pop("seconds_per_image")
    assert seconds > 0.0
    assert record == {
        "checkpoint": str(checkpoint),
        "step": 6,
        "context": [str(file) for file in context_files],
        "num_images": 3,
        "seed": 5,
        "settings": {
            "steps": 2,
            "stepper": "dpmpp_2m",
            "guidance": "cfg",
            "guidance_scale": 1.5,
            "guidance_interval": [0.0, 1.0],
            "guidance_rescale": 0.0,
            "guidance_schedule": "constant",
            "guidance_options": [],
            "cache_size": 25,
            "cache_dtype": None,
            "slide": False,
        },
    }


def test_contact_sheet_holds_context_and_samples(sampled, checkpoint, context_files):
    output, _ = sampled
    sheet = np.asarray(Image.open(output / "contact_sheet.png").convert("RGB"))
    read = m2m_jax.Sampler.from_checkpoint(checkpoint).read(context_files)
    for tile in [*read, *_images(output).values()]:
        assert _contains(sheet, tile)


def _contains(sheet, tile):
    """Whether `tile`, perhaps enlarged by a whole number, is somewhere in `sheet`."""
    windows = np.lib.stride_tricks.sliding_window_view
    for factor in (1, 2, 3, 4, 6, 8):
        pixels = tile.repeat(factor, 0).repeat(factor, 1)
        if min(sheet.shape[0] - pixels.shape[0], sheet.shape[1] - pixels.shape[1]) < 0:
            break
        # Its first column and then, where that is found, all of it.
        columns = windows(sheet, (pixels.shape[0], 1, 3)).reshape(-1, sheet.shape[1], pixels.shape[0], 3)
        for row, column in np.argwhere((columns == pixels[:, 0]).all((2, 3))):
            if np.array_equal(sheet[row : row + pixels.shape[0], column : column + pixels.shape[1]], pixels):
                return True
    return False


def test_seeds(sampled, checkpoint, context_files, tmp_path):
    """The same call writes the same files, replacing what stood there; another seed does not."""
    output, _ = sampled
    arguments = (f"--checkpoint={checkpoint}", f"--context={context_files[0]},{context_files[1]}")
    _sample(tmp_path / "out", *arguments, "--num_images=4", "--seed=6")
    other = _images(tmp_path / "out")
    _sample(tmp_path / "out", *arguments, "--num_images=3", "--seed=5")
    again = _images(tmp_path / "out")
    expected = _images(output)
    assert again.keys() == expected.keys()
    for name, image in expected.items():
        np.testing.assert_array_equal(again[name], image)
        assert np.any(other[name] != image)


def test_context_by_folder_and_pattern_and_a_page(sampled, checkpoint, sets, context_files, tmp_path):
    arguments = (f"--checkpoint={checkpoint}", "--num_images=3", "--seed=5", "--num_context=2", "--html")
    for context in (sets / "set00", sets / "set00" / "*"):
        printed = _sample(tmp_path / "out", *arguments, f"--context={context}")
        assert printed.splitlines()[-1] == str(tmp_path / "out" / "index.html")
        for name, image in _images(sampled[0]).items():
            np.testing.assert_array_equal(_images(tmp_path / "out")[name], image)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img ") == 5 and page.count('class="framed"') == 2 and "prefers-color-scheme: dark" in page
    assert 'src="http' not in page and "guidance_scale" in page
    result = run("sample", f"--checkpoint={checkpoint}", f"--context={tmp_path}/none*", f"--output={tmp_path / 'no'}")
    assert result.code == 2 and "there is no image at" in result.err and not (tmp_path / "no").exists()


def test_without_context(checkpoint, tmp_path):
    _sample(tmp_path / "out", f"--checkpoint={checkpoint / 'checkpoints'}", "--num_images=1")
    assert set(_images(tmp_path / "out")) == {"000.png"}
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["context"] == []
    assert (tmp_path / "out" / "contact_sheet.png").exists()


def test_without_a_contact_sheet(checkpoint, tmp_path):
    arguments = (f"--checkpoint={checkpoint}", "--num_images=1", "--nocontact_sheet")
    printed = _sample(tmp_path / "out", *arguments)
    assert printed.splitlines()[-1] == str(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000.png", "sample.json"}


def test_sets(checkpoint, sets, sampled, context_files, tmp_path):
    arguments = ("--num_context=2", "--num_images=3", "--seed=5", "--stepper=dpmpp_2m")
    _sample(tmp_path / "out", f"--checkpoint={checkpoint}", f"--sets={sets}", *arguments)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"set00", "set01", "contact_sheet.png"}
    for name in ("set00", "set01"):
        record = json.loads((tmp_path / "out" / name / "sample.json").read_text())
        assert [os.path.dirname(file) for file in record["context"]] == [str(sets / name)] * 2
        assert len(_images(tmp_path / "out" / name)) == 3
    # As if the set had been named by --context: within a rounding, for it was alone then.
    for name, image in _images(sampled[0]).items():
        assert np.abs(_images(tmp_path / "out" / "set00")[name].astype(int) - image).max() <= 1


def test_names_that_are_no_text_on_a_page(checkpoint, sets, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    shutil.copytree(sets / "set00", tmp_path / "sets" / name)
    _sample(tmp_path / "out", f"--checkpoint={checkpoint}", f"--sets={tmp_path / 'sets'}", "--num_images=1", "--html")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name, "contact_sheet.png", "index.html"}
    context = json.loads((tmp_path / "out" / name / "sample.json").read_text())["context"]
    assert all(os.path.exists(file) for file in context)
    assert "caf\N{REPLACEMENT CHARACTER}" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_a_reader_that_goes_away_and_a_full_disk_under_stdout_lose_no_sample(checkpoint, tmp_path):
    command = f"{sys.executable} -m m2m_jax.sample --checkpoint={checkpoint} --num_images=1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number, (redirection, code) in enumerate((("| head -0", 0), ("> /dev/full", 2))):
        line = f'{command} --output={tmp_path / str(number)} {redirection}; exit "${{PIPESTATUS[0]}}"'
        result = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr and "--output" not in result.stderr
        assert ("standard output" in result.stderr) == bool(code)
        assert (tmp_path / str(number) / "sample.json").exists()


def test_python(checkpoint, sampled, context_files):
    sampler = m2m_jax.Sampler.from_checkpoint(checkpoint)
    images = sampler(context_files, num_images=3, seed=5)
    assert (images.shape, images.dtype) == ((3, SIZE, SIZE, 3), np.uint8)
    np.testing.assert_array_equal(images, list(_images(sampled[0]).values()))
    # File names, PIL images and arrays are one and the same.
    pixels = sampler.read(context_files)
    np.testing.assert_array_equal(sampler([Image.fromarray(x) for x in pixels], num_images=3, seed=5), images)
    np.testing.assert_array_equal(sampler(pixels, num_images=3, seed=5), images)


def test_settings_and_step(checkpoint):
    sampler = m2m_jax.Sampler.from_checkpoint(checkpoint, step=3, stepper="ddim", guidance_scale=1.0)
    assert sampler.step == 3
    expected = SamplingSettings(steps=2, stepper="ddim", guidance_scale=1.0)
    assert sampler.settings == expected
    with pytest.raises(UserError, match="num_images must be at least 1, not 0"):
        sampler([], num_images=0)
    for given in ({"guidance": 2.0}, {"guidance_scale": "two"}, {"steps": 25.0}):
        with pytest.raises(UserError, match=next(iter(given))) as error:
            m2m_jax.Sampler.from_checkpoint(checkpoint, **given)
        assert "damaged" not in str(error.value)
    with pytest.raises(UserError, match="2 sets need as many seeds"):
        sampler.sample_sets([CONTEXT[0], CONTEXT[1]], 1, np.array([0]))
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"not {seed}"):
            sampler([], num_images=1, seed=seed)


CONTEXT = np.random.default_rng(1).integers(0, 256, (3, 2, SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize(("num_devices", "stepper"), [(1, "ddpm"), (2, "dpmpp_2m")])
def test_an_image_is_the_same_whatever_its_batch_and_devices(sampler, num_devices, stepper):
    """Also where the stepper draws noise at every step."""
    contexts, seeds = [CONTEXT[0], CONTEXT[1][:0], CONTEXT[2][:1]], np.array([3, 4, 5])
    settings = dataclasses.replace(sampler.settings, stepper=stepper)
    sampler = dataclasses.replace(sampler, settings=settings, devices=tuple(jax.devices()[:num_devices]))
    together = sampler.sample_sets(contexts, 2, seeds)
    assert together.shape == (3, 2, SIZE, SIZE, 3)
    turned = sampler.sample_sets(contexts[::-1], 2, seeds[::-1])[::-1]
    alone = np.stack([sampler(context, 2, seed=seed) for context, seed in zip(contexts, seeds, strict=True)])
    for other in (turned, alone):
        assert np.abs(together.astype(int) - other).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 1


def test_images_stream_as_they_are_finished(sampler):
    stream = sampler.stream(CONTEXT[0], num_images=2, seed=3)
    first = next(stream)
    np.testing.assert_array_equal([first, *stream], sampler(CONTEXT[0], num_images=2, seed=3))


def test_who_watches_sees_every_step_and_gets_the_same_images(sampler):
    seen = []

    def on_step(progress):
        preview = progress.preview()
        assert (preview.shape, preview.dtype) == ((1, SIZE, SIZE, 3), np.uint8)
        seen.append((progress.image, progress.num_images, progress.step, progress.num_steps, preview[0]))

    images = sampler(CONTEXT[0], num_images=2, seed=3, on_step=on_step)
    assert [place for *place, _ in seen] == [[0, 2, 1, 2], [0, 2, 2, 2], [1, 2, 1, 2], [1, 2, 2, 2]]
    # After the last step the prediction is the image.
    np.testing.assert_array_equal([seen[1][-1], seen[3][-1]], images)
    assert np.any(seen[0][-1] != images[0])
    np.testing.assert_array_equal(images, sampler(CONTEXT[0], num_images=2, seed=3))


def test_steps_on_a_terminal(sampler):
    terminal = io.StringIO()
    sampler(CONTEXT[0], num_images=2, on_step=step_line(terminal, "set 1 of 1"))
    lines = terminal.getvalue().split("\r\033[K")
    assert lines[1].startswith("set 1 of 1: image 1 of 2, step 1 of 2, ") and lines[1].endswith(" s left")
    assert any(line.startswith("set 1 of 1: image 2 of 2, step 2 of 2, 0 s left") for line in lines)
    assert lines[-1] == ""


def test_nothing_is_compiled_as_a_set_grows(sampler):
    sampler = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, cache_size=7))
    programs = compiled(sampler.static, sampler._mesh).values()
    assert not any(program._cache_size() for program in programs)
    sampler(CONTEXT[0][:1], num_images=2)
    sampler(CONTEXT[0], num_images=3)
    sampler([], num_images=1)
    assert {program._cache_size() for program in programs} == {1}


def test_a_set_that_outgrows_the_cache_is_refused_or_slides(sampler):
    small = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, cache_size=2))
    with pytest.raises(UserError, match="2 context images and 2 to generate need a cache of 3, and cache_size is 2"):
        small(CONTEXT[0], num_images=2)
    sliding = dataclasses.replace(small, settings=dataclasses.replace(small.settings, slide=True))
    images = sliding(CONTEXT[0], num_images=3, seed=3)
    exact = sampler(CONTEXT[0], num_images=3, seed=3)
    np.testing.assert_array_equal(images[0], exact[0])
    assert images.shape == exact.shape and np.any(images[2] != exact[2])


def test_a_single_image_model_is_given_no_context(sampler):
    """Which it would not read; nor does it keep images, so no cache is too small."""
    alone = dataclasses.replace(
        sampler,
        unet_config=dataclasses.replace(sampler.unet_config, attentions=("self",)),
        unet_params={name: x for name, x in sampler.unet_params.items() if not is_set_attention(name)},
        settings=dataclasses.replace(sampler.settings, cache_size=1),
    )
    images = alone([], num_images=4, seed=5)
    assert len(np.unique(images.reshape(4, -1), axis=0)) == 4
    with pytest.raises(UserError, match="reads no context: give no context images"):
        alone([np.zeros((SIZE, SIZE, 3), np.uint8)], num_images=1)


def test_each_image_depends_on_those_before_it_alone(sampler):
    context = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    images = sampler(context, num_images=2, seed=3)
    # More images change nothing of the first ones; finished images are context like any other.
    np.testing.assert_array_equal(sampler(context, num_images=1, seed=3)[0], images[0])
    other = context.copy()
    other[0] = 255 - other[0]
    assert np.any(sampler(other, num_images=1, seed=3)[0] != images[0])
    assert np.any(sampler(context[::-1], num_images=1, seed=3)[0] != images[0])
    assert np.any(images[1] != images[0])


IMPORTED = """
import runpy, sys
try:
    runpy.run_module("m2m_jax.sample", run_name="__main__")
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def test_the_sampler_needs_no_training_libraries(checkpoint, tmp_path):
    """What serves carries no data pipeline, no optimizer and no other framework. (Flax itself imports Optax.)"""
    arguments = [f"--checkpoint={checkpoint}", "--num_images=1", f"--output={tmp_path / 'out'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORTED, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "000.png").exists()
    modules = set(result.stderr.splitlines()[-1].split())
    assert "m2m_jax.sampling.sampler" in modules
    unwanted = {"grain", "ml_collections", "tensorboardX", "tensorflow", "tensorflow_datasets", "torch", "transformers"}
    unwanted |= {f"m2m_jax.{name}" for name in ("config_rules", "data", "train", "training.optimizer")}
    assert modules & unwanted == set()


def test_help_lists_the_settings():
    command = [sys.executable, "-m", "m2m_jax.sample", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "--guidance_scale" in result.stdout and "--checkpoint" in result.stdout


def test_the_example_runs(checkpoint, sets, tmp_path):
    main = runpy.run_path(str(ROOT / "examples" / "sample_from_python.py"))["main"]
    main(str(checkpoint), str(sets / "set00"), str(tmp_path / "out"))
    assert sorted(_images(tmp_path / "out")) == ["000.png", "001.png", "002.png"]


def test_sampling_runs_no_kernel_of_training(sampler, monkeypatch):
    """So a checkpoint of a run on a TPU samples on a CPU, whatever kernel its config names."""
    only = Registry("attention backend")
    only.register("prefix")(Backend(prefix))
    monkeypatch.setattr("m2m_jax.models.attentions.BACKENDS", only)
    unet_config = dataclasses.replace(sampler.unet_config, attention_backend="splash")
    static, params = dataclasses.replace(sampler, unet_config=unet_config).static, sampler.params
    images, seed_b = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.uint8), np.zeros(1, np.uint32)
    cache = jax.eval_shape(static.empty_cache, params, seed_b)
    cache = jax.eval_shape(
        static.append, params, cache, seed_b, jax.eval_shape(static.encode, params, images), np.ones(1, bool)
    )
    carry = jax.eval_shape(static.begin, params, cache, seed_b)
    assert jax.eval_shape(static.denoise, params, cache, seed_b, carry, 0, 1) == carry
