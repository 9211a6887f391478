"""Exported bundles, and the sampler binary that needs none of this project's models."""

import json
import os
import pathlib
import shutil
import site
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_fixtures import write_image_folder
from PIL import Image
from run_fixtures import ROOT, run, train_tiny
from safetensors.numpy import load_file

import m2m_jax
from m2m_jax.core.errors import UserError
from m2m_jax.sampling.bundle import MANIFEST, PARAMS, PLATFORMS, SEPARATOR, Bundle, program_file
from m2m_jax.sampling.set_sampler import PROGRAMS

SIZE = 32
CONTEXT = np.random.default_rng(1).integers(0, 256, (3, 2, SIZE, SIZE, 3), np.uint8)
SETTINGS = {"stepper": "ddpm", "cache_size": 6, "guidance_scale": 1.5}  # noise at every step, and two branches
# What the binary may use, and what jax itself needs.
ALLOWED = ("jax", "jaxlib", "numpy", "PIL", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory).workdir


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """(folder, what was printed)."""
    output = tmp_path_factory.mktemp("export") / "new" / "bundle"
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    result = run("export", f"--checkpoint={checkpoint}", f"--output={output}", *flags)
    assert result.code == 0, result.err
    return output, result.out


@pytest.fixture
def bundle(exported, tmp_path):
    """One to spoil."""
    return pathlib.Path(shutil.copytree(exported[0], tmp_path / "bundle"))


def test_files(exported, checkpoint):
    folder, printed = exported
    assert {file.name for file in folder.iterdir()} == {MANIFEST, PARAMS, *map(program_file, PROGRAMS)}
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
    assert printed.startswith(f"{folder}: step 6, ") and printed.endswith("for cpu, cuda, tpu\n")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["about"]["settings"]["stepper"] == "ddpm" and manifest["platforms"] == list(PLATFORMS)
    assert manifest["reads_context"]
    assert manifest["schedule"]["prediction_type"] == "v_prediction"
    # The parameters are those of the checkpoint, under names that any safetensors library reads.
    sampler = m2m_jax.Sampler.from_checkpoint(checkpoint)
    flat = load_file(folder / PARAMS)
    assert set(flat) == {f"{model}{SEPARATOR}{name}" for model in sampler.params for name in sampler.params[model]}
    for name, x in sampler.unet_params.items():
        np.testing.assert_array_equal(flat[f"unet{SEPARATOR}{name}"], x)


def test_images_are_those_of_the_sampler(exported, checkpoint):
    """Sets of different sizes together, from the same program."""
    sampler, bundle = m2m_jax.Sampler.from_checkpoint(checkpoint, **SETTINGS), Bundle(exported[0])
    contexts, seeds = [CONTEXT[0], CONTEXT[1][:0], CONTEXT[2][:1]], np.array([3, 4, 5])
    images = bundle.sample_sets(contexts, 3, seeds)
    assert (images.shape, images.dtype) == ((3, 3, SIZE, SIZE, 3), np.uint8)
    assert np.abs(images.astype(int) - sampler.sample_sets(contexts, 3, seeds)).max() <= 1
    with pytest.raises(UserError, match="need a cache of 7, and cache_size is 6"):
        bundle(CONTEXT[0], num_images=6)


def test_latents_are_those_of_the_sampler(exported, checkpoint):
    sampler, bundle = m2m_jax.Sampler.from_checkpoint(checkpoint, **SETTINGS), Bundle(exported[0])
    walks = []
    for programs in (sampler.programs, bundle.programs):
        seed_b = jnp.asarray([7], jnp.uint32)
        cache = programs["empty_cache"](seed_b)
        cache = programs["append"](cache, seed_b, programs["encode"](jnp.asarray(CONTEXT[0][:1])), jnp.ones(1, bool))
        walk = programs["begin"](cache, seed_b)
        walks.append(programs["denoise"](cache, seed_b, walk, np.int32(0), np.int32(bundle.num_steps)))
    assert walks[0].keys() == walks[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *walks)


def _cut_off(bundle):
    file = bundle / program_file("denoise")
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(bundle):
    data = bytearray((bundle / PARAMS).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / PARAMS).write_bytes(data)


def _remove(bundle):
    (bundle / program_file("decode")).unlink()


def _newer(bundle):
    _change(bundle, format=3)


def _elsewhere(bundle):
    _change(bundle, platforms=["tpu"])


def _garble(bundle):
    (bundle / MANIFEST).write_text('{"format": ')


def _no_manifest(bundle):
    (bundle / MANIFEST).unlink()


def _change(bundle, **fields):
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest | fields))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_cut_off, r"denoise.exported has \d+ bytes, not \d+: copy the bundle again"),
        (_flip_a_bit, "params.safetensors is not the file that was exported"),
        (_remove, "decode.exported is missing"),
        (_newer, "is of bundle format 3, and this program reads format 2"),
        (_elsewhere, "was exported for tpu; this machine has cpu"),
        (_garble, "manifest.json is damaged"),
        (_no_manifest, "is no bundle: manifest.json is missing"),
        (shutil.rmtree, "is no bundle: manifest.json is missing"),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused(bundle, spoil, words):
    spoil(bundle)
    with pytest.raises(UserError, match=words):
        Bundle(bundle)


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """dist/m2m-sample.pyz of this tree, made elsewhere."""
    path = tmp_path_factory.mktemp("dist") / "m2m-sample.pyz"
    command = ["make", "--no-print-directory", "sampler", f"SAMPLER={path}", f"BUILD={path.parent / 'build'}"]
    command.append(f"SAMPLER_PYTHON={sys.executable}")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The environment of a Python that finds no packages but the allowed ones."""
    folder = tmp_path_factory.mktemp("site")
    for packages in map(pathlib.Path, site.getsitepackages()):
        for path in packages.iterdir():
            if path.name in ALLOWED or path.name.split("-")[0].split(".")[0] in ALLOWED:
                (folder / path.name).symlink_to(path)
    return os.environ | {"PYTHONPATH": str(folder)}


def _run_binary(binary, environment, *arguments):
    # -S: without the packages of this Python; -s: nor those of its user.
    command = [sys.executable, "-S", "-s", str(binary), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_binary_samples_as_the_api_does(exported, binary, bare_python, checkpoint, tmp_path):
    assert binary.stat().st_size < 1_000_000
    sets, output = write_image_folder(tmp_path / "sets", num_sets=2, images_per_set=2), tmp_path / "out"
    arguments = (f"--sets={sets}", "--num_images=2", "--seed=4", f"--output={output}", "--html")
    result = _run_binary(binary, bare_python, f"--bundle={exported[0]}", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(output / "index.html")
    names = ["contact_sheet.png", "index.html", "set00", "set01"]
    assert sorted(path.name for path in output.iterdir()) == names
    sampler = m2m_jax.Sampler.from_checkpoint(checkpoint, **SETTINGS)
    for i, name in enumerate(names[2:]):
        record = json.loads((output / name / "sample.json").read_text())
        assert record["seed"] == 4 + i and record["settings"]["stepper"] == "ddpm" and record["step"] == 6
        expected = sampler(sorted((sets / name).iterdir()), num_images=2, seed=4 + i)
        for j, image in enumerate(expected):
            written = np.asarray(Image.open(output / name / f"{j:03d}.png")).astype(int)
            assert np.abs(written - image).max() <= 1


def test_the_binary_refuses_in_one_line(binary, bare_python, bundle, tmp_path):
    _flip_a_bit(bundle)
    for arguments, words in (
        ((f"--bundle={bundle}",), "is not the file that was exported"),
        ((f"--bundle={bundle}", "--num_images=0"), "--num_images is 0; it must be at least 1"),
    ):
        result = _run_binary(binary, bare_python, *arguments, f"--output={tmp_path / 'out'}")
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr
        assert not (tmp_path / "out").exists()


def test_export_replaces_nothing(exported, checkpoint):
    result = run("export", f"--checkpoint={checkpoint}", f"--output={exported[0]}")
    assert result.code == 2 and "exists already" in result.err
