"""The emoji data set of many hands: npm packages, the table of subjects, splits and sets."""

import collections
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import data_config, distinct_images
from run_fixtures import run

from m2m_jax.core.errors import UserError
from m2m_jax.data import pipeline
from m2m_jax.data.emoji import hands, hands_builder, iconify, naming
from m2m_jax.data.emoji.table import load_table
from m2m_jax.data.likeness import COPY, likeness
from m2m_jax.data.preparing import prepare
from m2m_jax.data.sources.emoji_hands import EmojiHandsSource

SIZE = 32
CATEGORIES = ("animals & nature", "food & drink", "symbols")
PACKAGES = Path("data/npm")  # of make npm-emoji; tests that need it are skipped without


def write_package(folder, name, bodies, more=None, metadata=None, chars=None):
    """An npm package as `npm pack` leaves it. bodies: {icon: SVG}. more: fields of icons.json."""
    icons = {"prefix": name, "icons": {icon: {"body": svg} for icon, svg in bodies.items()}, "width": 32, "height": 32}
    files = {"icons": icons | (more or {}), "metadata": metadata or {}, "chars": chars or {}}
    with tarfile.open(iconify.package_file(folder, name), "w:gz") as archive:
        for file, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{file}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def shape(colour, points):
    return f'<path fill="{colour}" d="M{points}z"/>'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where some categories of the data set were prepared as they are where npm never ran."""
    few = tuple(subject for subject in load_table() if subject.category in CATEGORIES)
    directory = str(tmp_path_factory.mktemp("hands"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hands_builder, "load_table", lambda: few)
        prepare("emoji_hands", SIZE, directory, directory, verbose=False)
    return directory


@pytest.fixture(scope="module")
def without_npm(directory):
    """Its records: split -> list."""
    sources = {
        split: EmojiHandsSource.open_split(directory, SIZE, split, strict=True)
        for split in ("train", "validation", "test")
    }
    return {split: [source[i] for i in range(len(source.kinds))] for split, source in sources.items()}


def test_the_table_parts_no_component_no_kin_and_no_flags():
    table = load_table()
    assert len(table) > 2000
    assert len({subject.name for subject in table}) == len(table)
    splits = collections.defaultdict(set)
    for subject in table:
        splits[subject.component].add(subject.split)
        if subject.category == "flags":
            assert subject.split == "train"
    assert all(len(found) == 1 for found in splits.values())
    of = {subject.name: subject for subject in table}
    assert of["red-heart"].component == of["green-heart"].component
    assert of["man-pilot"].component == of["woman-pilot"].component == of["pilot"].component
    shares = collections.Counter(subject.split for subject in table)
    assert shares["test"] > 0.05 * len(table)
    assert shares["validation"] > 0.05 * len(table)


def test_without_npm_three_families_are_drawn(without_npm):
    for split, sets in without_npm.items():
        families = {text.rpartition(", ")[2] for record in sets for text in record.image_captions}
        assert families == set(hands.PYPI_STYLES), split
        assert {record.kind for record in sets} == {"style", "content"}, split


def test_content_rows_have_one_picture_a_hand_and_style_rows_one_family(without_npm):
    for sets in without_npm.values():
        for record in sets:
            subjects = {text.partition(", ")[0] for text in record.image_captions}
            families = [text.rpartition(", ")[2] for text in record.image_captions]
            if record.kind == "content":
                assert len(subjects) == 1
                assert len({hands.hand_of(family) for family in families}) == len(families)
            else:
                assert len(set(families)) == 1
                assert len(subjects) == len(families)


def test_examples_are_made_of_it_and_it_is_checked(directory):
    config = data_config(name="emoji_hands", directory=directory, images_per_set=3)
    example = pipeline.open_examples(config, split="train", seed=0)[0]
    assert example["images_nhwc"].shape == (3, SIZE, SIZE, 3)
    checked = run("data.check", directory, "--output=")
    assert checked.code == 0, checked.err
    assert "emoji_hands" in checked.out
    with pytest.raises(UserError, match=r"'hands'.*validation"):
        pipeline.open_examples(config, split="hands", seed=0)


def test_no_image_of_a_set_copies_another(without_npm):
    for sets in without_npm.values():
        for record in sets:
            images = distinct_images([record])
            alike = likeness(images, images)
            np.fill_diagonal(alike, 0)
            assert alike.max() <= COPY, record.set_id


def test_no_held_out_image_is_a_copy_of_a_training_image(without_npm):
    images = {split: distinct_images(sets) for split, sets in without_npm.items()}
    for split in ("validation", "test"):
        assert likeness(images[split], images["train"]).max() <= COPY
    assert likeness(images["test"], images["validation"]).max() <= COPY


@pytest.mark.slow
@pytest.mark.skipif(not iconify.families_in(PACKAGES), reason="npm's packages are not there: make npm-emoji")
@pytest.mark.parametrize("size", [32, 64])
def test_the_whole_data_set_shows_training_no_copy_of_what_is_held_out(tmp_path, size):
    builder = prepare("emoji_hands", size, str(tmp_path), str(PACKAGES), verbose=False)
    splits = {}
    for split in hands_builder.SPLITS:
        source = EmojiHandsSource.open_split(str(tmp_path), size, split, strict=True)
        splits[split] = [source[i] for i in range(len(source.kinds))]
    train = distinct_images(splits["train"])
    assert len(train) > 9000
    for split in splits.keys() - {"train"}:
        assert likeness(distinct_images(splits[split]), train).max() <= COPY, split
    for split, sets in splits.items():
        seen = {hands.hand_of(text.rpartition(", ")[2]) for record in sets for text in record.image_captions}
        unseen = hands_builder.SPLITS[split][1]
        assert all((hand in hands.UNSEEN_HANDS) == unseen for hand in seen), split
    assert set(builder.info.metadata["families"]) == {name for of in hands.HANDS.values() for name in of}


def test_a_held_out_copy_is_left_out():
    subjects = {subject.split: subject for subject in load_table()}
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[2:5, 1:4] = (200, 30, 30, 255)
    recoloured, other = picture.copy(), picture.copy()
    recoloured[2:5, 1:4, :3] = (30, 90, 30)
    other[6:, :] = 255
    other[6:, :, :3] = 0
    drawn = {
        ("noto", subjects["train"].name): picture,
        ("noto", subjects["test"].name): recoloured[:, ::-1],
        ("emojione-v1", subjects["train"].name): recoloured,
        ("twemoji", subjects["test"].name): other,
    }
    kept, dropped = hands_builder.drop_copies(list(subjects.values()), drawn)
    assert set(kept) == {("noto", subjects["train"].name), ("twemoji", subjects["test"].name)}
    assert dropped == {"test": 1, "hands": 1}


def test_a_package_is_read_without_being_unpacked(tmp_path):
    square, sun = shape("#f00", "0 0h32v32h-32"), shape("#fc0", "4 4h8v8h-8")
    write_package(
        tmp_path, "noto", {"red-square": square, "sun": sun},
        more={"aliases": {"sunny": {"parent": "sun"}, "nus": {"parent": "sun", "hFlip": True}}},
        metadata={"categories": {"Travel & Places": ["sun"]}}, chars={"2600": "sun"},
    )  # fmt: skip
    assert iconify.families_in(tmp_path) == ["noto"]
    family = iconify.load_family(tmp_path, "noto")
    assert family.aliases == {"sunny": "sun"}
    assert family.draw("moon", 16) is None
    np.testing.assert_array_equal(family.draw("sunny", 16), family.draw("sun", 16))
    pixels = family.draw("red-square", 26)
    assert pixels.shape == (26, 26, 4)
    assert tuple(pixels[13, 13]) == (255, 0, 0, 255)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no icons", "no JSON"])
def test_a_damaged_package_names_the_remedy(tmp_path, damage):
    if damage != "missing":
        write_package(tmp_path, "noto", {} if damage == "no icons" else {"sun": shape("#fc0", "4 4h8v8h-8")})
    path = iconify.package_file(tmp_path, "noto")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    if damage == "no JSON":
        path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="npm pack @iconify-json/noto@"):
        iconify.load_family(tmp_path, "noto")


def test_names_and_codepoints_bring_families_together(tmp_path):
    svg = shape("#fc0", "4 4h8v8h-8")
    write_package(tmp_path, "noto", {"alarm-clock": svg, "waving-hand-dark-skin-tone": svg, "woman-pilot": svg},
                  chars={"23f0": "alarm-clock", "1f469-200d-2708": "woman-pilot"})  # fmt: skip
    write_package(
        tmp_path, "fxemoji", {"alarmclock": svg, "squiggle": svg}, metadata={"categories": {"Nature": ["squiggle"]}}
    )
    write_package(tmp_path, "emojione", {"man-pilot": svg}, chars={"1f468-200d-2708": "man-pilot"})
    named = naming.name_subjects([iconify.load_family(tmp_path, name) for name in ("noto", "fxemoji", "emojione")])
    of = {subject.name: subject for subject in named}
    assert set(of) == {"alarm-clock", "squiggle", "woman-pilot", "man-pilot"}
    assert of["alarm-clock"].others == ("alarmclock",)
    assert of["alarm-clock"].codepoints == (0x23F0,)
    assert of["alarm-clock"].group == "time"
    assert of["squiggle"].category == of["squiggle"].group == "animals & nature"
    assert of["woman-pilot"].kin == of["man-pilot"].kin


def test_missing_data_set_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"python -m m2m_jax\.data\.prepare --name=emoji_hands --size=48 --directory="):
        EmojiHandsSource.open_split(str(tmp_path / "none"), 48, "train", strict=True)


def test_every_family_has_its_licence():
    text = Path(hands_builder.__file__).with_name("hands_licenses.md").read_text()
    for families in hands.HANDS.values():
        for family in families:
            assert f"`{family}`" in text
    for name, (version, _) in iconify.PACKAGES.items():
        assert version in text, name
