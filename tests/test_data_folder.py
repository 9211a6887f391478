"""A folder of folders: what is read, and what is refused by name."""

import numpy as np
import pytest
from data_fixtures import data_config, write_image_folder
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image
from m2m_jax.data import folder
from m2m_jax.data.pipeline import open_examples
from m2m_jax.data.records import BadRecord


@pytest.fixture
def root(tmp_path):
    return write_image_folder(tmp_path / "data", num_sets=12, images_per_set=5)


def _load(root, split="train", images_per_set=4):
    return folder.load(str(root), split, images_per_set)


def _names(source):
    return [source[index].set_id for index in range(len(source))]


def test_reads_every_format_and_mode(root):
    source = _load(root)
    assert source.num_images == [5] * len(source)
    assert set(source.kinds) == {"folder"}
    for index in range(len(source)):
        record = source[index]
        assert record.num_images == 5
        for image in record.images:
            assert decode_image(image, "test").mode == "RGBA"


def test_held_out_captions_stay_whole_and_their_images_are_augmented(root):
    tags = ",".join("abcdefgh")
    for subfolder in root.iterdir():
        (subfolder / "caption.txt").write_text(tags)
    config = data_config(name="folder", path=str(root), caption_tag_dropout=0.5)

    def examples(**options):
        found = open_examples(config, split="validation", seed=0, tokenizer=np.array, **options)
        return [found[i] for i in range(4)]

    shortened, whole, plain = examples(), examples(whole_captions=True), examples(augment=False)
    assert all(len(text) < len(tags) for example in shortened for text in example["token_ids_ns"])
    for a, b, c in zip(shortened, whole, plain, strict=True):
        assert b["token_ids_ns"].tolist() == c["token_ids_ns"].tolist() == [tags] * 4
        np.testing.assert_array_equal(a["images_nhwc"], b["images_nhwc"])
    assert any((b["images_nhwc"] != c["images_nhwc"]).any() for b, c in zip(whole, plain, strict=True))


def test_splits_are_disjoint_and_stable(root):
    train, validation = _names(_load(root)), _names(_load(root, "validation"))
    assert len(validation) == 1
    assert sorted(train + validation) == [f"set{number:02d}" for number in range(12)]
    assert _names(_load(root, "test")) == validation
    # A set that is added does not reshuffle the others into training that were held out.
    write_image_folder(root / "more", num_sets=1, images_per_set=5)
    (root / "more" / "set00").rename(root / "set99")
    (root / "more").rmdir()
    assert set(_names(_load(root, "validation"))) <= {*validation, "set99"}


def test_a_single_set_serves_both_splits(tmp_path):
    root = write_image_folder(tmp_path / "data", num_sets=1, images_per_set=4)
    assert _names(_load(root)) == _names(_load(root, "validation")) == ["set00"]


def test_two_sets_are_one_and_one(tmp_path):
    root = write_image_folder(tmp_path / "data", num_sets=2, images_per_set=4)
    assert len(_load(root)) == len(_load(root, "validation")) == 1


def test_captions_hidden_and_other_files(root):
    for number in range(12):
        (root / f"set{number:02d}" / "caption.txt").write_text("a  blue\nset\n")
    (root / "set03" / ".hidden.png").write_bytes(b"not an image")
    (root / "set03" / "notes.md").write_text("not an image either")
    (root / ".git").mkdir()
    (root / "readme.txt").write_text("")
    source = _load(root)
    assert {source[index].caption for index in range(len(source))} == {"a blue set"}
    assert set(source.num_images) == {5}


def test_more_than_25_images_are_all_used(tmp_path):
    root = write_image_folder(tmp_path / "data", num_sets=1, images_per_set=30)
    assert _load(root).num_images == [30]


def _missing(root):
    return root / "missing", r"missing.*no such folder"


def _not_a_folder(root):
    return root / "set00" / "0.png", "not a folder"


def _no_subfolders(root):
    return root / "set00", "no subfolders"


def _empty_subfolder(root):
    (root / "empty").mkdir()
    return root, r"empty: no images"


def _undecodable_file(root):
    (root / "set02" / "broken.JPEG").write_bytes(b"\xff\xd8\xff but no more")
    return root, r"set02/broken\.JPEG: not an image"


def _empty_file(root):
    (root / "set02" / "broken.png").write_bytes(b"")
    return root, r"set02/broken\.png: the file is empty"


def _link_to_elsewhere(root):
    (root.parent / "secret.png").write_bytes((root / "set00" / "0.png").read_bytes())
    (root / "set02" / "link.png").symlink_to("../../secret.png")
    return root, r"set02/link\.png: is a link to .*secret\.png, outside of"


def _link_to_a_folder_elsewhere(root):
    (root.parent / "elsewhere").mkdir()
    (root / "set99").symlink_to(root.parent / "elsewhere")
    return root, r"set99: is a link to .*elsewhere, outside of"


def _too_few_images(root):
    (root / "set04" / "0.png").unlink()
    (root / "set04" / "1.JPG").unlink()
    return root, r"set04: 3 images, fewer than data\.images_per_set=4"


def _caption_is_not_text(root):
    (root / "set04" / "caption.txt").write_bytes(b"\xff\xfe\xff")
    return root, r"set04/caption\.txt: not readable"


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "spoil",
    [
        _missing,
        _not_a_folder,
        _no_subfolders,
        _empty_subfolder,
        _undecodable_file,
        _empty_file,
        _link_to_elsewhere,
        _link_to_a_folder_elsewhere,
        _too_few_images,
        _caption_is_not_text,
    ],
)
def test_what_cannot_be_used_is_named(root, spoil, split):
    path, message = spoil(root)
    with pytest.raises(UserError, match=message) as error:
        _load(path, split)
    assert "\n" not in str(error.value)


def test_links_within_the_folder_are_followed(root):
    (root / "set00" / "again.png").symlink_to("../set01/0.png")
    (root.parent / "name").symlink_to(root)
    assert sum(_load(root.parent / "name", None).num_images) == 12 * 5 + 1


def test_what_only_decoding_finds_is_named_when_it_is_read(root):
    """The header of a file that is cut off is good: a hundred thousand images are not decoded at every start."""
    file = root / "set02" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-800])
    examples = open_examples(data_config(name="folder", path=str(root), images_per_set=5), split="train", seed=0)
    with pytest.raises(BadRecord, match=r"set02/0\.png: the image is damaged"):
        [examples[index] for index in range(examples.epoch_length)]
    file.unlink()
    with pytest.raises(BadRecord, match=r"set02/0\.png: no such file"):
        [examples[index] for index in range(examples.epoch_length)]


def test_without_strictness_faults_wait_for_the_reading(root):
    for spoil in (_empty_subfolder, _undecodable_file, _too_few_images, _caption_is_not_text, _link_to_elsewhere):
        spoil(root)
    source = folder.load(str(root), None, 4, strict=False)
    faults = {}
    for index in range(len(source)):
        try:
            assert source[index].num_images == source.num_images[index]
        except BadRecord as error:
            assert source.num_images[index] == 0
            faults[str(error)] = index
    assert len(faults) == 3  # the link, the caption and the empty folder; the others are sets to be read


def test_empty_path():
    with pytest.raises(UserError, match=r"data\.path=''"):
        folder.load("", "train", 4)


def test_unknown_split(root):
    with pytest.raises(UserError, match="'nonsense'"):
        _load(root, "nonsense")
