"""Augmentations are drawn once a set, and shared by its images."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from m2m_jax.core.images import on_white
from m2m_jax.data import transform
from m2m_jax.data.augmentation import MIN_GROUND_LUMINANCE, SetAugmentation, resampling_table

LUMINANCE = np.array([0.299, 0.587, 0.114])
EVERYTHING = SetAugmentation(
    hue_degrees=180, ground_probability=1, ink_probability=1, contrast=0.3, scale=0.3, mirror_probability=0.5
)


def _disc(colour, size=32):
    """A disc, left half only, of a colour: uint8 RGBA [size, size, 4] with antialiased edges."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    alpha = np.clip(size * 0.42 - np.hypot(x, y) + 0.5, 0, 1) * (x < 0)
    return np.concatenate([np.broadcast_to(colour, (size, size, 3)), np.round(255 * alpha)[..., None]], axis=-1).astype(
        np.uint8
    )


def _set(*colours):
    return np.stack([_disc(colour) for colour in colours])


def _parameters(augmentation, seed, size=32):
    return augmentation.draw(np.random.default_rng(seed), size)


def _apply(augmentation, images, seed=0):
    return transform.augment(images, _parameters(augmentation, seed, images.shape[1]))


@pytest.mark.parametrize("seed", range(5))
def test_shared_by_the_set(seed):
    images = _set((200, 30, 40), (30, 90, 200), (0, 0, 0), (200, 30, 40))
    together = _apply(EVERYTHING, images, seed)
    np.testing.assert_array_equal(together[0], together[3])
    for position in range(4):
        alone = _apply(EVERYTHING, images[position : position + 1], seed)
        np.testing.assert_array_equal(alone[0], together[position])


def test_differs_between_sets():
    images = _set((200, 30, 40))
    assert len({_apply(EVERYTHING, images, seed).tobytes() for seed in range(20)}) == 20


def test_no_augmentation_is_a_white_ground():
    images = _set((200, 30, 40), (0, 0, 0))
    result = _apply(SetAugmentation(), images)
    assert result.dtype == np.uint8
    assert np.abs(result.astype(int) - on_white(images)).max() <= 1
    assert (result[:, :, -1] == 255).all()


def test_grounds_stay_bright_and_vary():
    grounds = np.array(
        [_apply(SetAugmentation(ground_probability=1), _set((0, 0, 0)), seed)[0, 0, 0] for seed in range(200)]
    )
    luminance = grounds @ LUMINANCE / 255
    assert luminance.min() > MIN_GROUND_LUMINANCE - 0.01
    assert np.ptp(grounds, axis=0).min() > 150
    assert (np.ptp(grounds, axis=1) > 100).any()  # saturated ones too


def test_ground_probability():
    augmentation = SetAugmentation(ground_probability=0.3)
    white = sum((_apply(augmentation, _set((0, 0, 0)), seed)[0, 0, 0] == 255).all() for seed in range(300))
    assert 180 <= white <= 240


def test_ink_recolours_line_art_only_and_stays_legible():
    augmentation = SetAugmentation(ink_probability=1, ground_probability=1)
    plain = dataclasses.replace(augmentation, ink_probability=0)
    images = _set((0, 0, 0), (200, 30, 40))
    for seed in range(50):
        inked, without = _apply(augmentation, images, seed), _apply(plain, images, seed)
        np.testing.assert_array_equal(inked[1], without[1])
        assert (inked[0, 16, 8] != 0).any()
        ink, ground = inked[0, 16, 8] @ LUMINANCE, inked[0, 0, 0] @ LUMINANCE
        assert ground - ink > 0.1 * 255


def test_hue_rotation_keeps_brightness_and_grey():
    augmentation = SetAugmentation(hue_degrees=180)
    images = _set((150, 110, 120), (90, 90, 90))
    rotated = np.stack([_apply(augmentation, images, seed)[:, 16, 8] for seed in range(30)]).astype(float)
    np.testing.assert_allclose(rotated[:, 0] @ LUMINANCE, np.array([150, 110, 120]) @ LUMINANCE, atol=1.5)
    np.testing.assert_allclose(rotated[:, 1], 90, atol=1)
    assert np.ptp(rotated[:, 0], axis=0).min() > 15


def test_mirror():
    images = _set((200, 30, 40))
    mirrored = _apply(SetAugmentation(mirror_probability=1), images)
    np.testing.assert_array_equal(mirrored, _apply(SetAugmentation(), images)[:, :, ::-1])


def test_scale_shrinks_about_the_centre_and_enlarges_photographs():
    full = np.concatenate([np.full((1, 32, 32, 3), 40), np.full((1, 32, 32, 1), 255)], axis=-1).astype(np.uint8)
    photograph = full.copy()
    photograph[:, 8:24, 8:24, :3] = 200
    cut_out = full.copy()
    cut_out[:, [0, -1], :, 3] = cut_out[:, :, [0, -1], 3] = 0
    augmentation = SetAugmentation(scale=0.5)
    areas = []
    for seed in range(10):
        shrunk = (_apply(augmentation, cut_out, seed)[0, ..., 0] < 148).astype(int)
        assert abs((shrunk * (np.arange(32) - 15.5)).sum()) <= 32
        areas.append(shrunk.sum())
        enlarged = _apply(augmentation, photograph, seed)[0, ..., 0]
        assert enlarged.max() <= 200  # no ground shows
        assert (enlarged > 120).sum() >= 16 * 16
    assert max(areas) <= 30 * 30
    assert min(areas) < 24 * 24


def test_draws_do_not_depend_on_other_values():
    images = _set((200, 30, 40))
    with_mirror = _apply(SetAugmentation(hue_degrees=90, mirror_probability=1), images, 7)
    without = _apply(SetAugmentation(hue_degrees=90, contrast=0.0), images, 7)
    np.testing.assert_array_equal(with_mirror, without[:, :, ::-1])


AUGMENTATIONS = {
    "everything": EVERYTHING,
    "nothing": SetAugmentation(),
    "colours": SetAugmentation(hue_degrees=180, contrast=0.99),
    "much smaller": SetAugmentation(scale=0.9),
    "mirror": SetAugmentation(mirror_probability=0.5),
    "ink": SetAugmentation(ink_probability=0.5, ground_probability=0.5),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_same_bits_on_the_host_and_in_a_step(name):
    """NumPy set by set; JAX, compiled, on a whole batch."""
    rng = np.random.default_rng(0)
    rgba_bnhwc = rng.integers(0, 256, (6, 3, 24, 24, 4), np.uint8)
    rgba_bnhwc[::2, ..., 3] = 255  # photographs
    rgba_bnhwc[1, 0, ..., 1:3] = rgba_bnhwc[1, 0, ..., :1]  # line art
    parameters_bs = np.stack([_parameters(AUGMENTATIONS[name], seed, 24) for seed in range(6)])
    host = np.stack([transform.augment(*one) for one in zip(rgba_bnhwc, parameters_bs, strict=True)])
    batch = {"rgba_bnhwc": rgba_bnhwc, "augmentation_bs": parameters_bs, "other_b": np.arange(6)}
    device = jax.jit(transform.finish)(batch)
    assert device.keys() == {"images_bnhwc", "other_b"}
    np.testing.assert_array_equal(device["images_bnhwc"], host)
    np.testing.assert_array_equal(transform.augment(rgba_bnhwc, parameters_bs), host)


def test_short_cuts_are_exact(monkeypatch):
    opaque = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 4), np.uint8)
    opaque[..., 3] = 255
    for seed in range(4):
        parameters = _parameters(SetAugmentation(mirror_probability=0.5), seed, 16)
        short = transform.augment(opaque, parameters)
        monkeypatch.setattr(transform, "_only_mirrored", lambda *_: False)
        np.testing.assert_array_equal(transform.augment(opaque, parameters), short)
        monkeypatch.undo()
    np.testing.assert_array_equal(on_white(opaque), opaque[..., :3])


def test_on_white_is_rounded_to_the_nearest():
    colour, alpha = np.mgrid[:256, :256].astype(np.uint8)
    got = on_white(np.stack([colour, colour, colour, alpha], -1))[..., 0]
    exact = (colour.astype(int) * alpha + 255 * (255 - alpha.astype(int))) / 255
    np.testing.assert_array_equal(got, np.round(exact))


@pytest.mark.parametrize("scale", [0.5, 0.85, 1.0])
def test_resampling_is_that_of_pillow(scale):
    """Pillow's, with its 8-bit weights: within a few of 255 levels."""
    size = 48
    image = np.asarray(Image.effect_noise((size, size), 60).resize((size, size)), np.uint8)
    start, weight = resampling_table(size, scale, int(2 / scale) + 1)
    matrix = np.zeros((size, size + 200))
    for k, column in enumerate(weight.reshape(size, -1).T):
        matrix[np.arange(size), start + k + 100] += column / 256
    matrix = matrix[:, 100 : 100 + size]
    margin = int(size * (1 / scale - 1) / 2) + 1
    padded = Image.fromarray(np.pad(image, margin))
    first, side = margin + (size - size / scale) / 2, size / scale
    box = (first, first, first + side, first + side)
    expected = np.asarray(padded.resize((size, size), Image.Resampling.BILINEAR, box)).astype(float)
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=3)
