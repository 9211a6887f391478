"""The data checker: what it reports of clean and of damaged data sets, its sheet, and its exit codes."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from data_fixtures import write_image_folder
from PIL import Image
from run_fixtures import config_argument, run
from test_data_damage import _not_finite, _shard, latents  # noqa: F401 (a fixture)

from m2m_jax.data import inspection


@pytest.fixture
def folder(tmp_path):
    """12 sets of 4 images, all different: write_image_folder's are of one colour a set."""
    root = write_image_folder(tmp_path / "images", num_sets=12, images_per_set=4)
    rng = np.random.default_rng(0)
    for number, file in enumerate(sorted(root.glob("*/*"))):
        Image.fromarray(rng.integers(0, 256, (20 + number, 30, 3), np.uint8)).save(file.with_suffix(".png"))
        if file.suffix != ".png":
            file.unlink()
    return root


def _check(path, tmp_path, *arguments):
    return run("data.check", path, f"--output={tmp_path / 'sheet.png'}", *arguments)


def test_a_clean_folder(folder, tmp_path):
    result = _check(folder, tmp_path)
    assert result.code == 0, result
    lines = result.out.splitlines()
    size = sum(file.stat().st_size for file in folder.glob("*/*"))
    assert lines[0] == f"12 sets, 48 images, {size / 1e6:.1f} MB"
    assert lines[1].split()[-5:] == ["folder", "12", "sets", "48", "images"]
    assert lines[2] == "images a set: 4 to 4, 4.0 on average"
    assert lines[3].startswith("pixels, longer side: 30 to 67; 48 sizes: ")
    assert lines[-2:] == ["0 problems", str(tmp_path / "sheet.png")]
    assert result.err == "read 12 of 12 sets\n"
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 4 * inspection.THUMBNAIL and sheet.height > 12 * inspection.THUMBNAIL


def test_every_problem_of_a_folder(folder, tmp_path):
    (folder / "set01" / "0.png").write_bytes(b"no image")
    (folder / "set02" / "0.png").write_bytes((folder / "set02" / "0.png").read_bytes()[:-200])
    shutil.copy(folder / "set03" / "0.png", folder / "set03" / "9.png")
    (folder / "set04" / "2.png").unlink()
    (folder / "empty").mkdir()
    (folder / "set05" / "caption.txt").write_bytes(b"\xff\xff")
    (folder / "set06" / "a.heic").write_bytes(b"")
    result = _check(folder, tmp_path)
    assert result.code == 1
    assert f"\n{folder}: not used: files .heic: 1 (set06/a.heic)\n" in result.out
    for words in (
        f"{folder}/set01/0.png: not an image that can be read",
        f"{folder}/set02/0.png: the image is damaged",
        f"{folder}/set03/9.png: has the pixels of {folder}/set03/0.png",
        f"{folder}/empty: no images",
        f"{folder}/set05/caption.txt: not readable as UTF-8",
    ):
        assert f"\n  {words}" in result.out
    assert "\n5 problems\n" in result.out
    # A config asks for its number of images, too.
    data = ("--config.data.name=folder", f"--config.data.path={folder}", f"--output={tmp_path / 'sheet.png'}")
    result = run("data.check", config_argument("emoji:tiny"), *data)
    assert result.code == 1 and "\n6 problems\n" in result.out
    assert "set 'set04': 3 images, fewer than data.images_per_set=4" in result.out
    # Sets with problems come first, and a red tile is in the place of an image that can't be read.
    result = _check(folder, tmp_path, "--sheet_sets=3", "--max_problems=1")
    assert "and 4 more; --max_problems shows them" in result.out
    red = (np.asarray(Image.open(tmp_path / "sheet.png")) == inspection._MISSING[0, 0]).all(-1).sum()
    assert red >= 2 * inspection.THUMBNAIL**2


def test_latents(latents, tmp_path):  # noqa: F811
    result = _check(latents, tmp_path)
    assert result.code == 0, result
    assert "12 sets, 60 images" in result.out and "latents [4, 4, 4]: 60" in result.out
    assert "latents: mean 5.500, standard deviation 3.452" in result.out
    _not_finite(latents)
    _shard(latents, 2).unlink()
    result = _check(latents, tmp_path)
    assert result.code == 1
    assert "set 's5': the latents of image 2, 4 are not finite" in result.out
    assert f"{_shard(latents, 2)} is missing; remove what is damaged and make it again with: COMMAND (4 records)" in (
        result.out
    )
    assert "\n5 problems\n" in result.out


def test_ids_must_differ(latents, tmp_path):  # noqa: F811
    shutil.copy(_shard(latents, 0), _shard(latents, 1))
    result = _check(latents, tmp_path)
    assert result.code == 1 and "the id 's3' is that of another set" in result.out


def test_bad_input(folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "precomputed-train.json").write_text(json.dumps({"version": 1}))
    for arguments, words in (
        (["none"], "none: no such folder"),
        ([], "name the data set once"),
        ([folder, config_argument("emoji:tiny")], "name the data set once"),
        ([folder, folder], "unexpected argument"),
        ([folder / "set00"], "has no subfolders"),
        ([folder, "--threads=0"], "must be at least 1"),
        ([broken], "precomputed-train.json is damaged"),
        (["--config=none.py"], "there is no config file 'none.py'"),
    ):
        result = run("data.check", *arguments, f"--output={tmp_path / 'sheet.png'}")
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1 and words in result.err
    assert not (tmp_path / "sheet.png").exists()
    assert {path.name for path in pathlib.Path(tmp_path).iterdir()} == {"broken", "images"}
