"""Bad input to the programs: one line on stderr that names the thing and the remedy, exit code 2, nothing written."""

import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest
from data_fixtures import write_image_folder
from PIL import Image
from run_fixtures import ROOT, config_argument, make_autoencoder, run, train_tiny

TINY = config_argument("emoji:tiny")
VAE = f"--config.autoencoder.path={ROOT / 'pretrained' / 'vae'}"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return make_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def folder(tmp_path):
    """Three usable sets of four pictures."""
    return write_image_folder(tmp_path / "images", num_sets=3, images_per_set=4)


def _tree(root: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()} | {
        str(path): (0, 0) for path in root.rglob("*") if path.is_dir()
    }


def _refused(root, *arguments) -> str:
    """The one line that the program says, having written nothing below `root`."""
    before = _tree(root)
    result = run(*arguments)
    assert result.code == 2, result
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert result.out == ""
    assert _tree(root) == before
    return result.err


# Training. Every field has limits of its own: tests/test_configuration.py.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([TINY, "--config.train.step=3"], "unknown config field config.train.step; did you mean config.train.steps?"),
        ([TINY, "--config.lerning_rate=3"], "unknown config field config.lerning_rate"),
        ([TINY, "--config.train.steps=0"], "config.train.steps is 0; it must be at least 1"),
        ([TINY, "--config.train.steps=many"], "config.train.steps"),
        ([TINY[:-1]], "unknown preset 'tin'; did you mean tiny?"),
        (["--config=configs/nothing.py"], "there is no config file 'configs/nothing.py'"),
        ([], "no config; name one"),
        ([TINY, "--config.mesh.fsdp=3"], "config.mesh.data=-1, config.mesh.fsdp=3"),
        ([TINY, "--config.data.batch_size=12"], "config.data.batch_size is 12; it must be a multiple of the 8 devices"),
        ([TINY, "--config.eval.batch_size=4"], "config.eval.batch_size is 4; it must be a multiple of the 8 devices"),
        (
            [TINY, VAE, "--config.data.directory=none"],
            "python -m m2m_jax.data.prepare --name=emoji --size=32 --directory=none",
        ),
        ([TINY, "--config.data.name=folder"], "config.data.path is empty"),
        ([TINY, VAE, "--config.data.name=folder", "--config.data.path=none"], "data.path='none': no such folder"),
        ([TINY, "stray"], "unexpected argument 'stray'"),
    ],
)
def test_train(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in _refused(tmp_path, "train", *arguments, "--workdir=run")


def test_train_without_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--workdir" in _refused(tmp_path, "train", TINY)


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _no_images(folder):
    (folder / "set09").mkdir()
    (folder / "set09" / "notes.txt").write_text("")


def _undecodable(folder):
    (folder / "set01" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")


def _cut_off(folder):
    file = next(path for path in folder.glob("set01/*.webp"))
    file.write_bytes(file.read_bytes()[:20])


def _few(folder):
    for file in sorted((folder / "set01").iterdir())[1:]:
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_empty, ["images", "has no subfolders"]),
        (_no_images, ["set09", "no images"]),
        (_undecodable, ["set01/broken.png", "not an image that can be read"]),
        (_cut_off, ["set01/2.webp"]),
        (_few, ["set01", "1 images, fewer than data.images_per_set=4"]),
    ],
)
def test_train_on_an_unusable_folder(tmp_path, folder, spoil, words):
    spoil(folder)
    data = ("--config.data.name=folder", f"--config.data.path={folder}")
    line = _refused(tmp_path, "train", TINY, *data, f"--workdir={tmp_path / 'run'}")
    for word in words:
        assert word in line


def _damage(folder):
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def _pickle(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(shutil.rmtree, "config.json is missing"), (_damage, "is damaged"), (_pickle, "is pickled and is not opened")],
)
def test_train_with_an_unusable_autoencoder(tmp_path, folder, autoencoder, spoil, words):
    broken = shutil.copytree(autoencoder, tmp_path / "vae")
    spoil(broken)
    data = ("--config.data.name=folder", f"--config.data.path={folder}", f"--config.autoencoder.path={broken}")
    assert words in _refused(tmp_path, "train", TINY, *data, f"--workdir={tmp_path / 'run'}")


def test_train_from_an_unusable_start(tmp_path, folder, autoencoder):
    data = ("--config.data.name=folder", f"--config.data.path={folder}", f"--config.autoencoder.path={autoencoder}")
    arguments = (TINY, *data, f"--workdir={tmp_path / 'run'}")
    assert "none" in _refused(tmp_path, "train", *arguments, f"--config.init.path={tmp_path / 'none'}")
    # The folder of another model.
    line = _refused(tmp_path, "train", *arguments, f"--config.init.path={autoencoder}")
    assert "describes a AutoencoderKL, not a UNet2DConditionModel" in line


def test_train_with_settings_that_only_evaluation_uses(tmp_path, folder, autoencoder):
    """They are refused at the start, not after hours."""
    data = ("--config.data.name=folder", f"--config.data.path={folder}", f"--config.autoencoder.path={autoencoder}")
    arguments = (TINY, *data, "--config.sample.steps=1001", f"--workdir={tmp_path / 'run'}")
    assert "must be in [1, 1000], not 1001" in _refused(tmp_path, "train", *arguments)


def test_train_in_the_workdir_of_another_model(tmp_path, tiny_run):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "run")
    arguments = (*tiny_run.arguments, "--config.model.block_out_channels=(32,)", f"--workdir={workdir}")
    line = _refused(tmp_path, "train", *arguments)
    assert "is of another model or optimizer" in line
    assert "use the config it was trained with, or another --workdir" in line


def test_train_in_a_file(tmp_path, folder, autoencoder):
    (tmp_path / "run").write_text("")
    data = ("--config.data.name=folder", f"--config.data.path={folder}", f"--config.autoencoder.path={autoencoder}")
    assert "--workdir=" in _refused(tmp_path, "train", TINY, *data, f"--workdir={tmp_path / 'run'}")


# Sampling


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    return path


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--num_images=0", "--num_images is 0; it must be at least 1"),
        ("--num_images=-2", "--num_images is -2; it must be at least 1"),
        ("--num_images=few", "--num_images"),
        ("--seed=-1", "--seed is -1; it must be at least 0"),
        ("--seed=4294967296", "--seed is 4294967296; numbers are at most 4294967295"),
        ("--num_context=-1", "--num_context is -1; it must be at least 0"),
        ("--stepper=rk4", "unknown stepper 'rk4'"),
        ("--steps=0", "--steps is 0; it must be at least 1"),
        ("--guidance_scale=-1", "--guidance_scale is -1.0; it must be at least 0"),
        ("--guidance_scale=nan", "--guidance_scale is nan; numbers are at most"),
        ("--steppes=3", "steppes"),
        ("--context=none.png", "none.png: no such file"),
        ("--context=.", "there is no image at ."),
        ("--sets=none", "--sets=none is not a folder"),
        ("--sets=.", "--sets=. holds no folder of images"),
    ],
)
def test_sample(tmp_path, monkeypatch, tiny_run, argument, words):
    monkeypatch.chdir(tmp_path)
    assert words in _refused(tmp_path, "sample", f"--checkpoint={tiny_run.workdir}", argument, "--output=new/out")


def test_sample_with_more_steps_than_levels(tmp_path, tiny_run):
    arguments = (f"--checkpoint={tiny_run.workdir}", "--steps=1001", f"--output={tmp_path / 'new' / 'out'}")
    assert "must be in [1, 1000], not 1001" in _refused(tmp_path, "sample", *arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "the file is empty"), (b"no picture at all", "not an image"), (None, "damaged")],
)
def test_sample_from_a_corrupt_image(tmp_path, tiny_run, picture, content, words):
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(picture.read_bytes()[:60] if content is None else content)
    arguments = (f"--checkpoint={tiny_run.workdir}", f"--output={tmp_path / 'out'}")
    line = _refused(tmp_path, "sample", *arguments, f"--context={picture},{corrupt}")
    assert "corrupt.png" in line
    assert words in line


def test_sample_from_sets_and_context(tmp_path, tiny_run, picture, folder):
    arguments = (f"--checkpoint={tiny_run.workdir}", f"--sets={folder}", f"--output={tmp_path / 'out'}")
    assert "exclude one another" in _refused(tmp_path, "sample", *arguments, f"--context={picture}")
    (folder / "set09").mkdir()
    assert "set09: no images (" in _refused(tmp_path, "sample", *arguments)


def test_sample_never_replaces_what_it_did_not_write(tmp_path, tiny_run, folder):
    checkpoint = f"--checkpoint={tiny_run.workdir}"
    same = ("sample", checkpoint, f"--sets={folder}", f"--output={folder}")
    assert "--output and --sets are the same folder" in _refused(tmp_path, *same)
    # A folder of the user's that happens to have the name of a set.
    (tmp_path / "out" / "set01").mkdir(parents=True)
    (tmp_path / "out" / "set01" / "thesis.txt").write_text("")
    taken = ("sample", checkpoint, f"--sets={folder}", f"--output={tmp_path / 'out'}")
    assert "set01 holds other files" in _refused(tmp_path, *taken)
    # The user's pictures are numbered as ours are.
    Image.new("RGB", (8, 8)).save(folder / "set00" / "000.png")
    pictures = ("sample", checkpoint, f"--context={folder / 'set00' / '000.png'}", f"--output={folder / 'set00'}")
    assert "set00 holds other files" in _refused(tmp_path, *pictures)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "--output=" in _refused(tmp_path, "sample", checkpoint, f"--output={output}")


def test_sample_more_than_the_cache_holds(tmp_path, tiny_run, folder):
    arguments = (f"--checkpoint={tiny_run.workdir}", f"--context={folder / 'set00'}", f"--output={tmp_path / 'out'}")
    line = _refused(tmp_path, "sample", *arguments, "--num_images=2", "--cache_size=4")
    assert "4 context images and 2 to generate need a cache of 5, and cache_size is 4" in line


def test_sample_and_export_to_a_full_disk(tmp_path, tiny_run, folder, monkeypatch):
    """As good as full: no file may grow beyond a few kilobytes. What stood there stays, and nothing half-written."""
    checkpoint, output = f"--checkpoint={tiny_run.workdir}", tmp_path / "out"
    arguments = ("sample", checkpoint, f"--context={folder / 'set00'}", "--num_images=1", f"--output={output}")
    assert run(*arguments).code == 0
    # Python does not notice that it wrote half of a module's bytecode, and fails to import it the next time.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before, limits = _tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
        results = [run(*arguments, "--seed=1"), run("export", checkpoint, f"--output={tmp_path / 'bundle'}")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for result, name in zip(results, ("out", "bundle"), strict=True):
        assert result.code == 2 and f"{name}" in result.err and "cannot be written: File too large" in result.err
        assert result.err.count("error: ") == 1
    assert _tree(tmp_path) == before


def _missing(workdir):
    shutil.rmtree(workdir)


def _empty_workdir(workdir):
    _empty(workdir)


def _empty_checkpoints(workdir):
    _empty(workdir / "checkpoints")


def _unfinished(workdir):
    """As a crash during the first save leaves it."""
    shutil.rmtree(workdir / "checkpoints" / "3")
    (workdir / "checkpoints" / "6").rename(workdir / "checkpoints" / "6.orbax-checkpoint-tmp-17")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing, "there is no checkpoint folder"),
        (_empty_workdir, "holds no checkpoint"),
        (_empty_checkpoints, "holds no checkpoint"),
        (_unfinished, "holds no checkpoint"),
    ],
)
@pytest.mark.parametrize("program", ["sample", "to_diffusers"])
def test_no_checkpoint(tmp_path, tiny_run, program, spoil, words):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "run")
    spoil(workdir)
    assert words in _refused(tmp_path, program, f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}")


# Export


def test_export(tmp_path, folder):
    data = (TINY, "--config.data.name=folder", f"--config.data.path={folder}")
    output = f"--output={tmp_path / 'out'}"
    assert "--num_sets is 0; it must be at least 1" in _refused(tmp_path, "data.export", *data, output, "--num_sets=0")
    assert "split 'tset'" in _refused(tmp_path, "data.export", *data, output, "--split=tset")
    assert "data.images_per_set" in _refused(tmp_path, "data.export", *data, output, "--config.data.images_per_set=9")
    (tmp_path / "out").mkdir()
    assert "exists already" in _refused(tmp_path, "data.export", *data, output)


def test_export_writes_what_the_sampler_reads(tmp_path, folder):
    data = (TINY, "--config.data.name=folder", f"--config.data.path={folder}")
    result = run("data.export", *data, f"--output={tmp_path / 'out'}", "--num_sets=2", "--split=train")
    assert result.code == 0, result.err
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/*/*"))
    assert names == [f"{s:03d}/{i:03d}.png" for s in range(2) for i in range(4)]
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}


# As a person calls them


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["m2m_jax.train", TINY, "--config.trian.steps=3", "--workdir=run"], "did you mean config.train.steps?"),
        (["m2m_jax.sample", "--checkpoint=none", "--output=out"], "there is no checkpoint folder none"),
    ],
)
def test_on_the_command_line(tmp_path, command, words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not list(tmp_path.iterdir())
