"""Likeness of drawings, and splits that part nothing that is alike."""

import numpy as np
import pytest

from m2m_jax.data.augmentation import _hue_rotation
from m2m_jax.data.likeness import COPY, like_pairs, likeness, shapes, without_copies
from m2m_jax.data.splits import connected_components, mend_split, split_by_component


def drawing(seed, size=24):
    """A random blot in one colour on white: uint8 [size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((4, 4)) < 0.5
    mask = np.kron(coarse, np.ones((size // 4, size // 4), bool))
    return np.where(mask[..., None], np.uint8(rng.integers(30, 160, 3)), np.uint8(255))


def turned(image, degrees):
    rotated = image.astype(np.float32) @ _hue_rotation(np.deg2rad(degrees)).T
    return np.clip(np.round(rotated), 0, 255).astype(np.uint8)


def test_a_drawing_in_another_hue_or_mirrored_is_a_copy_and_another_is_none():
    image, other = drawing(0), drawing(1)
    copies = np.stack([image, turned(image, 120), image[:, ::-1], turned(image, 200)[:, ::-1]])
    assert likeness(copies, image[None]).min() > COPY
    assert likeness(other[None], image[None]).max() < COPY


def test_one_luminance_all_over_has_no_shape():
    blank = np.full((2, 8, 8, 3), 255, np.uint8)
    assert not shapes(blank).any()
    assert likeness(blank, blank).max() == 0


def test_pairs_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("m2m_jax.data.likeness._ROWS_AT_ONCE", 3)
    images = np.stack([drawing(seed) for seed in range(8)] + [drawing(2)[:, ::-1], turned(drawing(5), 90)])
    matrix = likeness(images, images) > COPY
    expected = {(i, j) for i in range(10) for j in range(i + 1, 10) if matrix[i, j]}
    assert set(like_pairs(images)) == expected >= {(2, 8), (5, 9)}


def test_of_copies_the_first_stays():
    images = np.stack([drawing(0), drawing(1), drawing(0)[:, ::-1], drawing(2)])
    assert without_copies(images) == [0, 1, 3]


def test_components_reach_over_others_and_are_called_by_their_least():
    found = connected_components("abcdef", [("c", "b"), ("d", "c"), ("f", "e")])
    assert found == {"a": "a", "b": "b", "c": "b", "d": "b", "e": "e", "f": "e"}


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_split_holds_out_its_share_and_parts_no_component(share):
    components = {f"item {i}": f"component {i // 2}" for i in range(4000)}
    splits = split_by_component(components, held_out_share=share)
    for split in ("validation", "test"):
        assert np.mean([s == split for s in splits.values()]) == pytest.approx(share, abs=0.02)
    assert all(splits[f"item {i}"] == splits[f"item {i + 1}"] for i in range(0, 4000, 2))


def test_what_is_added_moves_nothing_else():
    few = {f"{i}": f"{i}" for i in range(500)}
    more = few | {f"new {i}": f"new {i}" for i in range(500)}
    before, after = split_by_component(few), split_by_component(more)
    assert all(after[item] == split for item, split in before.items())


def test_large_components_train():
    components = {f"{i}": f"{i % 100}" for i in range(1000)}
    assert set(split_by_component(components, largest=10).values()) == {"train", "validation", "test"}
    assert set(split_by_component(components, largest=9).values()) == {"train"}


def test_a_mended_split_holds_out_nothing_new_and_parts_nothing():
    old = {"a": "train", "b": "test", "c": "validation", "d": "test", "e": "test", "f": "train"}
    components = {"a": "a", "b": "a", "c": "c", "d": "c", "e": "e", "f": "f"}
    mended = mend_split(old, components)
    assert mended == {"a": "train", "b": "train", "c": "validation", "d": "validation", "e": "test", "f": "train"}
