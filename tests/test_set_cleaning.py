"""Which images of a set are kept, and what is counted."""

import numpy as np
import pytest
from PIL import Image

from m2m_jax.building.cleaning import SetRules, clean_set, difference_hash
from m2m_jax.core.errors import UserError


def drawing(seed: int, size: int = 32) -> np.ndarray:
    """Coarse coloured patches, uint8 [size, size, 3]."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC))


def flat(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(colour), (32, 32, 3)).copy()


def keep(images, rules=None, safety_filter=None):
    kept, dropped = clean_set(np.stack(images), "a caption", rules or SetRules(), safety_filter)
    return kept, dict(dropped)


def test_blank_images_are_those_that_hardly_vary_in_any_channel():
    nearly = flat(250, 3, 120)
    nearly[0, 0] = 0
    one_channel = flat(250, 3, 120)
    one_channel[:16, :, 1] = 40
    images = [drawing(0), flat(250, 3, 120), nearly, one_channel]
    assert nearly.std() > 90  # the colour itself is no content
    assert keep(images, SetRules(blank_std=8.0)) == ([0, 3], {"blank_std": 2})
    assert keep(images, SetRules(blank_std=0.0))[0] == [0, 1, 2, 3]


def test_duplicates_are_those_of_the_same_pixels():
    other = drawing(0)
    other[0, 0, 0] ^= 1
    images = [drawing(0), drawing(1), drawing(0), other, drawing(1)]
    assert keep(images) == ([0, 1, 3], {"drop_duplicates": 2})
    assert keep(images, SetRules(drop_duplicates=False)) == ([0, 1, 2, 3, 4], {})


def test_near_duplicates_are_those_whose_hashes_are_close():
    brighter = np.uint8(np.clip(drawing(0).astype(int) * 0.9 + 20, 0, 255))
    distances = [np.count_nonzero(difference_hash(drawing(0)) != difference_hash(x)) for x in (brighter, drawing(1))]
    assert distances[0] <= 3 and distances[1] >= 15
    images = [drawing(0), brighter, drawing(1)]
    assert keep(images, SetRules(near_duplicate_bits=8)) == ([0, 2], {"near_duplicate_bits": 1})
    assert keep(images, SetRules(near_duplicate_bits=0)) == ([0, 1, 2], {})
    # Equal hashes are closer than one bit; pixels need not be equal.
    images = [drawing(0), drawing(0)]
    assert keep(images, SetRules(drop_duplicates=False, near_duplicate_bits=1)) == ([0], {"near_duplicate_bits": 1})


def test_an_image_counts_once_and_the_filter_sees_what_is_left():
    seen = []

    def keep_dark(images_nhwc, caption):
        seen.append((images_nhwc.shape, caption))
        return images_nhwc.mean(axis=(1, 2, 3)) < 128

    dark, light = np.uint8(drawing(0) // 4), np.uint8(255 - drawing(1) // 4)
    images = [flat(0, 0, 0), flat(0, 0, 0), dark, light, dark]
    kept, dropped = keep(images, SetRules(safety_filter="m:f"), keep_dark)
    assert kept == [2]
    assert dropped == {"blank_std": 2, "drop_duplicates": 1, "safety_filter": 1}
    assert seen == [((2, 32, 32, 3), "a caption")]
    # Nothing is left to be asked about.
    assert keep([flat(0, 0, 0)], SetRules(), keep_dark) == ([], {"blank_std": 1})
    assert len(seen) == 1


@pytest.mark.parametrize("returned", [True, np.ones(2), np.ones(3, bool), [1, 1], None])
def test_a_filter_that_returns_something_else_is_refused(returned):
    with pytest.raises(UserError, match=r"safety_filter=m:f returned .* it must return bool \[2\]"):
        keep([drawing(0), drawing(1)], SetRules(safety_filter="m:f"), lambda images, caption: returned)


@pytest.mark.parametrize("name", ["nothing", "no_such_module:f", "numpy:no_such_function", "numpy:pi", ":f", "m:"])
def test_a_filter_that_is_none_is_refused(name):
    with pytest.raises(UserError, match=f"safety_filter={name}"):
        SetRules(safety_filter=name).load_filter()


@pytest.mark.parametrize("rules", [{"blank_std": -1.0}, {"near_duplicate_bits": 65}, {"min_images": 0}])
def test_rules_that_cannot_be_meant_are_refused(rules):
    with pytest.raises(UserError, match=next(iter(rules))):
        SetRules(**rules)
