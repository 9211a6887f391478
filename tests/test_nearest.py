"""Whether samples are copies: copies are found, in other colours and mirrored; what is no copy is not."""

import json
import re

import numpy as np
import pytest
from mis_fixtures import IMAGE_SIZE, write_mis
from PIL import Image, ImageOps
from run_fixtures import config_argument, run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sets of four pictures, each of coarse patches of its own."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in "abcd":
        (root / name).mkdir()
        for position in range(4):
            patches_hwc = rng.integers(0, 256, (5, 5, 3), np.uint8)
            Image.fromarray(patches_hwc).resize((64, 64)).save(root / name / f"{position}.png")
    return root


def _nearest(samples, *data):
    arguments = (config_argument("emoji:tiny"), f"--config.data.image_size={IMAGE_SIZE}", *data)
    return run("data.nearest", *arguments, f"--samples={samples}", f"--output={samples / 'nearest.png'}")


def _similarity(text: str, where: str) -> tuple[int, float]:
    """(images, median) that was printed of what is nearest in training or in the context."""
    found = re.search(rf"nearest in {where}, (\d+) images: median ([\d.]+)", text)
    return int(found[1]), float(found[2])


@pytest.mark.parametrize("with_context", [True, False])
def test_a_copy_is_found(tmp_path, pictures, with_context):
    original, other = pictures / "a" / "0.png", pictures / "b" / "0.png"
    sample = tmp_path / "samples" / "a"
    sample.mkdir(parents=True)
    (sample / "sample.json").write_text(json.dumps({"context": [str(other)] * with_context}))
    copy = ImageOps.mirror(ImageOps.grayscale(Image.open(original).convert("RGB")))
    copy.save(sample / "0.png")
    result = _nearest(tmp_path / "samples", "--config.data.name=folder", f"--config.data.path={pictures}")
    assert result.code == 0, result.err
    count, median = _similarity(result.out, "training")
    assert count == 1 and median > 0.95
    if with_context:
        assert _similarity(result.out, "the context")[1] < 0.95
    else:
        assert "the context" not in result.out
    assert (tmp_path / "samples" / "nearest.png").is_file()


def test_noise_is_no_copy(tmp_path, pictures):
    sample = tmp_path / "samples" / "a"
    sample.mkdir(parents=True)
    (sample / "sample.json").write_text(json.dumps({"context": []}))
    noise_hwc = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise_hwc).save(sample / "0.png")
    result = _nearest(tmp_path / "samples", "--config.data.name=folder", f"--config.data.path={pictures}")
    assert _similarity(result.out, "training")[1] < 0.5


def test_what_has_no_images_is_refused(tmp_path):
    sample = tmp_path / "samples" / "a"
    sample.mkdir(parents=True)
    (sample / "sample.json").write_text(json.dumps({"context": []}))
    latents = write_mis(tmp_path / "mis", captions={"train": 2}, store="latents")
    data = ("--config.data.name=mis", f"--config.data.path={latents}", "--config.data.latents=True")
    result = _nearest(tmp_path / "samples", *data, "--config.data.augment.enabled=False")
    assert result.code == 2 and "holds latents alone; name the data set of images" in result.err
    result = _nearest(tmp_path, *data, "--config.data.augment.enabled=False")
    assert result.code == 2 and "holds no folder with a sample.json" in result.err
