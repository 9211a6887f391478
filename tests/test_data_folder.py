"""A folder of folders: what is read, and what is refused by name."""

import numpy as np
import pytest
from data_fixtures import data_config, write_image_folder
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.image_folder import list_images
from m2m_jax.core.images import decode_image
from m2m_jax.data.pipeline import open_examples
from m2m_jax.data.records import BadRecord
from m2m_jax.data.sources import folder
from m2m_jax.sampling.job import Job


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


def test_splits_are_disjoint(root):
    train, validation, test, whole = (_names(_load(root, split)) for split in folder.SPLITS)
    assert len(validation) == len(test) == 1
    assert sorted(train + validation + test) == whole == [f"set{number:02d}" for number in range(12)]


@pytest.mark.parametrize("pattern", ["set{:03d}", "{:03d}", "teapot {}"])
def test_sets_that_are_added_move_none(pattern):
    """As a folder grows, one by one; before there are enough, a split without a set of its own borrows one."""
    names = [pattern.format(number) for number in range(400)]
    where: dict[str, str] = {}
    for number in range(60, 400):
        splits = {split: folder.split_names(names[:number], split) for split in ("train", "validation", "test")}
        found = {name: split for split, of_split in splits.items() for name in of_split}
        assert len(found) == number == sum(map(len, splits.values()))
        assert where.items() <= found.items()
        where = found
    assert 10 <= len(splits["validation"]) <= 30 and 10 <= len(splits["test"]) <= 30


def test_a_set_that_is_added_moves_no_other():
    names = [f"set{number:03d}" for number in range(24)]
    for added in range(200):
        for split in folder.SPLITS:
            before = folder.split_names(names, split)
            assert folder.split_names([*names, f"new{added}"], split) - {f"new{added}"} == before


@pytest.mark.parametrize("number", range(3, 30))
def test_small_folders_hold_out_a_set_for_each_split(number):
    for pattern in ("{}", "a{}", "animals of {}"):
        names = [pattern.format(i) for i in range(number)]
        splits = [folder.split_names(names, split) for split in ("train", "validation", "test")]
        assert all(splits) and sum(map(len, splits)) == len(set.union(*splits)) == number


def test_a_single_set_serves_every_split(tmp_path):
    root = write_image_folder(tmp_path / "data", num_sets=1, images_per_set=4)
    assert all(_names(_load(root, split)) == ["set00"] for split in folder.SPLITS)


def test_two_sets_are_one_and_one(tmp_path):
    root = write_image_folder(tmp_path / "data", num_sets=2, images_per_set=4)
    train, validation, test = (_names(_load(root, split)) for split in ("train", "validation", "test"))
    assert len(train) == len(validation) == 1 and train != validation == test


def test_the_fingerprint_is_that_of_the_listing(root):
    prints = {split: _load(root, split).fingerprint for split in folder.SPLITS}
    assert len(set(prints.values())) == len(prints)
    moved = root.rename(root.parent / "elsewhere")
    assert {split: _load(moved, split).fingerprint for split in folder.SPLITS} == prints
    (held_out,) = _names(_load(moved, "validation"))
    changes = [
        lambda: (moved / "set00" / "0.png").rename(moved / "set00" / "new.png"),
        lambda: (moved / "set00" / "caption.txt").write_text("a caption"),
        lambda: (moved / "set00").rename(moved / "another"),
    ]
    for change in changes:
        change()
        found = {split: _load(moved, split).fingerprint for split in folder.SPLITS}
        assert {split for split in found if found[split] != prints[split]} == {"train", "all"}
        prints = found
    (moved / held_out / "7.png").write_bytes((moved / held_out / "0.png").read_bytes())
    found = {split: _load(moved, split).fingerprint for split in folder.SPLITS}
    assert {split for split in found if found[split] != prints[split]} == {"validation", "all"}


def test_every_format_is_read_under_every_name_of_it(tmp_path):
    """What the decoder reads is not passed over for its name."""
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".TIFF": "TIFF", ".gif": "GIF"}
    kinds |= {".avif": "AVIF", ".ppm": "PPM", ".apng": "PNG"}
    (tmp_path / "data" / "set").mkdir(parents=True)
    for suffix, kind in kinds.items():
        Image.new("RGB", (9, 8), (200, 30, 40)).save(tmp_path / "data" / "set" / f"a{suffix}", kind)
    source = _load(tmp_path / "data")
    assert source.num_images == [len(kinds)] and not source.notes
    for image, name in zip(source[0].images, source[0].files, strict=True):
        assert decode_image(image, name).size == (9, 8)


def test_what_is_not_used_is_counted_and_named(root, capsys):
    for name in ("a.heic", "b.heic", "notes"):
        (root / "set03" / name).write_bytes(b"")
    (root / "set04" / "more").mkdir()
    (root / "set04" / "x.png").mkdir()
    (root / "above.png").write_bytes(b"")
    (root / "__MACOSX").mkdir()
    (root / "set05" / "._000.png").write_bytes(b"hidden, and of macOS")
    expected = (
        "not used: files .heic: 2 (set03/a.heic, ...), files without a suffix: 1 (set03/notes), "
        "folders __MACOSX: 1 (__MACOSX), folders within sets: 2 (set04/more, ...), "
        "images beside the sets: 1 (above.png)"
    )
    assert _load(root).notes == (f"{root}: {expected}",)
    assert capsys.readouterr().err == f"warning: {root}: {expected}\n"
    _load(root, "validation")  # the run has heard of it
    assert capsys.readouterr().err == ""
    # Sampling lists a folder as training does.
    job = Job(output=str(root.parent / "out"), sets=str(root))
    source = _load(root, "all")
    listed = {one.set_id: [str(file) for file in one.files] for one in map(source.__getitem__, range(len(source)))}
    assert {name: list(map(str, files)) for name, files in job.find_sets().items()} == listed


def test_an_archive_of_macos_is_a_data_set(root):
    (root / "__MACOSX" / "set00").mkdir(parents=True)
    (root / "__MACOSX" / "set00" / "._0.png").write_bytes(b"no image")
    assert len(_load(root, "all")) == 12


def test_numbers_are_counted_by_value(tmp_path):
    root = write_image_folder(tmp_path / "data", num_sets=1, images_per_set=11)
    for file in (root / "set00").iterdir():
        Image.open(file).convert("RGB").save(file.with_suffix(".png"))
    numbers = [file.stem for file in list_images(root / "set00") if file.suffix == ".png"]
    assert numbers == [str(number) for number in range(11)]


def test_an_animation_is_named_before_the_run(root):
    frames = [Image.new("RGB", (8, 8), (index * 80, 0, 0)) for index in range(3)]
    frames[0].save(root / "set03" / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"set03/moving\.gif: is an animation of 3 frames"):
        _load(root)


def test_a_byte_order_mark_is_no_part_of_a_caption(root):
    (root / "set00" / "caption.txt").write_bytes("\ufeffa  cat\n".encode())
    assert "a cat" in [_load(root, "all")[i].caption for i in range(12)]


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


def _caption_with_a_zero_byte(root):
    (root / "set04" / "caption.txt").write_bytes("a cat".encode("utf-16-le"))
    return root, r"set04/caption\.txt: has a zero byte"


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
        _caption_with_a_zero_byte,
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
    assert sum(_load(root.parent / "name", "all").num_images) == 12 * 5 + 1


@pytest.mark.parametrize("spoil", [_link_to_elsewhere, _link_to_a_folder_elsewhere])
def test_links_out_of_the_folder_are_followed_where_that_is_asked_for(root, spoil):
    spoil(root)
    if (root / "set99").exists():
        (root.parent / "elsewhere" / "a.png").write_bytes((root / "set00" / "0.png").read_bytes())
    config = data_config(name="folder", path=str(root), follow_links=True, images_per_set=1)
    examples = open_examples(config, split="all", seed=0)
    assert examples.epoch_length == 12 * 5 + 1
    assert [examples[index] for index in range(examples.epoch_length)]


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
    source = folder.load(str(root), "all", 4, strict=False)
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
