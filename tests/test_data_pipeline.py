"""Batches: their order is a function of (seed, example index), on any number of hosts, from any step."""

import itertools

import numpy as np
import pytest
from data_fixtures import build_emoji, data_config, write_image_folder, write_latents
from mis_fixtures import write_mis
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, fit_square
from m2m_jax.data import fetch, pipeline
from m2m_jax.data.choose import Stream

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def emoji_directory(tmp_path_factory):
    return build_emoji(tmp_path_factory)


@pytest.fixture
def config(emoji_directory):
    return data_config(directory=emoji_directory)


def _examples(config, *, split="train", seed=3, augment=True):
    return pipeline.open_examples(config, split=split, seed=seed, augment=augment)


def _dataset(config, *, batch_size=8, rows=None, threads=2, **options):
    return pipeline.make_dataset(_examples(config, **options), batch_size=batch_size, rows=rows, threads=threads)


def _assert_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value)


@pytest.mark.parametrize("images_per_set", [1, 4, 25])
def test_batch_format(config, images_per_set):
    config.images_per_set = images_per_set
    batch = _dataset(config)[5]
    assert batch["images_bnhwc"].shape == (8, images_per_set, 32, 32, 3)
    assert batch["images_bnhwc"].dtype == np.uint8
    assert batch["example_index_b"].dtype == np.int64
    np.testing.assert_array_equal(batch["example_index_b"], np.arange(40, 48))
    assert batch["record_index_b"].dtype == np.int64
    assert pipeline.inputs(batch).keys() == {"images_bnhwc"}


def test_a_batch_says_which_sets_it_holds(config):
    examples, source = _examples(config), pipeline.open_source(config, "train")
    batch = pipeline.make_dataset(examples, batch_size=8)[5]
    assert batch["record_index_b"].tolist() == [examples.choose(index)[0] for index in range(40, 48)]
    assert examples.set_ids(batch["record_index_b"]) == [source[int(i)].set_id for i in batch["record_index_b"]]


@pytest.mark.parametrize("augment", [False, True])
def test_same_batches_from_any_start(config, augment):
    dataset = _dataset(config, augment=augment)
    from_start = pipeline.batches(dataset, 0, prefetch=2)
    run = [next(from_start) for _ in range(6)]
    fresh = _dataset(config, augment=augment, threads=1)
    resumed = pipeline.batches(fresh, 3, prefetch=3)
    for step in (3, 4, 5):
        _assert_equal(next(resumed), run[step])
        _assert_equal(fresh[step], run[step])
    foreground = pipeline.batches(fresh, 2, prefetch=0)
    _assert_equal(next(foreground), run[2])
    for prefetch in (0, 2):
        some = list(pipeline.batches(fresh, 1, prefetch, stop_step=3))
        assert len(some) == 2
        _assert_equal(some[1], run[2])


def test_far_steps_cost_no_more(config):
    dataset = _dataset(config)
    step = 10**9
    batch = next(pipeline.batches(dataset, step, prefetch=1))
    assert batch["example_index_b"][0] == 8 * step


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_share_the_global_batch(config, process_count):
    whole = _dataset(config)
    shares = np.split(np.arange(8), process_count)
    parts = [_dataset(config, rows=rows) for rows in shares]
    for step in (0, 7):
        shares = [part[step] for part in parts]
        together = {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}
        _assert_equal(together, whole[step])


def test_batch_size_does_not_change_examples(config):
    small, large = _dataset(config, batch_size=4), _dataset(config, batch_size=8)
    np.testing.assert_array_equal(
        np.concatenate([small[2]["images_bnhwc"], small[3]["images_bnhwc"]]), large[1]["images_bnhwc"]
    )


def test_seed_changes_everything(config):
    examples, others = _examples(config), _examples(config, seed=4)
    assert [examples.choose(index)[0] for index in range(20)] != [others.choose(index)[0] for index in range(20)]


@pytest.mark.parametrize("name", ["emoji", "folder", "mis", "precomputed"])
def test_splits_share_no_random_stream(name, config, tmp_path):
    """Else the images of example i of every split would be recoloured alike, and in the same order of the sets."""
    if name == "folder":
        config.update(name=name, path=str(write_image_folder(tmp_path / "images", num_sets=12, images_per_set=4)))
    elif name == "mis":
        sets = dict.fromkeys(("train", "validation", "test"), 6)
        config.update(name=name, path=str(write_mis(tmp_path / "mis", captions=sets)))
    elif name == "precomputed":
        config.update(name=name, path=str(write_latents(tmp_path, splits=("train", "validation", "test"))))
        config.augment.enabled = False
    draws = []
    for split in ("train", "validation", "test"):
        examples = _examples(config, split=split)
        draws += [examples._chooser.rng(*place).random(4).tobytes() for place in itertools.product(Stream, range(20))]
    assert len(set(draws)) == len(draws)


def test_held_out_images_are_recoloured_by_draws_of_their_own(tmp_path):
    """One picture in every split: the same example of two splits is another picture."""
    root = write_image_folder(tmp_path / "images", num_sets=1, images_per_set=4)
    config = data_config(name="folder", path=str(root))
    splits = [[_examples(config, split=split)[i]["images_nhwc"].mean((0, 1, 2)) for i in range(8)] for split in SPLITS]
    assert not np.isclose(splits[0], splits[1]).all(-1).any()


def test_an_epoch_sees_every_set_once(config):
    examples = _examples(config, split="validation")
    length = examples.epoch_length
    epochs = [[examples.choose(epoch * length + index)[0] for index in range(length)] for epoch in range(2)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == length
    assert epochs[0] != epochs[1]


def test_an_epoch_of_single_images_sees_every_image_once(config):
    config.images_per_set = 1
    source = pipeline.open_source(config, "validation")
    examples = _examples(config, split="validation")
    length = examples.epoch_length
    assert length == sum(source.num_images)
    chosen = {(record, int(image[0])) for record, image in map(examples.choose, range(length))}
    assert chosen == {(record, image) for record, count in enumerate(source.num_images) for image in range(count)}


def test_images_of_a_set_are_distinct_and_reordered(config):
    examples = _examples(config)
    choices = [examples.choose(index)[1].tolist() for index in range(200)]
    assert all(len(set(chosen)) == 4 for chosen in choices)
    assert sum(chosen == sorted(chosen) for chosen in choices) < 40  # 1 in 24 by chance


def test_kinds_and_counts_filter_sets(config):
    source = pipeline.open_source(config, "train")
    config.images_per_set = 10
    for kind in ("style", "content"):
        config.kinds = (kind,)
        examples = _examples(config)
        for index in range(50):
            record = examples.choose(index)[0]
            assert source.kinds[record] == kind
            assert source.num_images[record] >= 10


def test_without_augmentation_images_are_on_white(config):
    examples = _examples(config, augment=False)
    record, chosen = examples.choose(17)
    source = pipeline.open_source(config, "train")
    for position, image in enumerate(chosen):
        stored = decode_image(source[record].images[image], "test")
        white = Image.new("RGBA", stored.size, (255, 255, 255, 255))
        expected = np.asarray(Image.alpha_composite(white, stored))[..., :3].astype(int)
        assert np.abs(examples[17]["images_nhwc"][position] - expected).max() <= 1
    config.augment.enabled = False
    np.testing.assert_array_equal(_examples(config)[17]["images_nhwc"], examples[17]["images_nhwc"])


def test_folder_batches(tmp_path):
    root = write_image_folder(tmp_path / "data", num_sets=5, images_per_set=4)
    config = data_config(name="folder", path=str(root), images_per_set=3, image_size=16, kinds=())
    batch = _dataset(config, augment=False)[0]
    assert batch["images_bnhwc"].shape == (8, 3, 16, 16, 3)
    # Whole images, aspect kept: white beside what is not square.
    corners = batch["images_bnhwc"][:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(-1).mean() > 0.9
    assert (batch["images_bnhwc"][:, :, 8, 8] < 255).any()


def test_fit_square_keeps_aspect_and_does_not_alias():
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = fit_square(Image.fromarray(stripes), 16)
    assert pixels.shape == (16, 16, 4)
    assert (pixels[[0, 3, 12, 15], :, 3] == 0).all()
    assert (pixels[4:12, :, 3] == 255).all()
    assert np.abs(pixels[5:11, 2:14, :3].astype(int) - 128).max() < 10


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"images_per_set": 26}, {}, "images_per_set=26.*has 25 images"),
        ({"images_per_set": 0}, {}, "images_per_set=0"),
        ({"kinds": ("nonsense",)}, {}, "nonsense.*content.*style"),
        ({"name": "nonsense"}, {}, "nonsense.*emoji"),
        ({"image_size": 40}, {}, r"prepare --name=emoji --size=40"),
    ],
)
def test_what_cannot_work_is_refused(config, changes, options, message):
    config.update(changes)
    with pytest.raises(UserError, match=message):
        _dataset(config, **options)


def test_latents_are_not_pixels(config):
    class Latents(pipeline.RecordSource):
        name, kinds, num_images, has_images = "some latents", ("style",), (4,), False

    with pytest.raises(UserError, match="some latents holds latents alone, and images are wanted"):
        pipeline.SetExamples(Latents(), config, split="train", seed=0, augment=False)


def test_errors_of_the_background_threads_arrive(config, monkeypatch):
    def fail(*_):
        raise UserError("this image is broken")

    dataset = _dataset(config)
    monkeypatch.setattr(fetch, "decode_image", fail)
    with pytest.raises(UserError, match="this image is broken"):
        next(pipeline.batches(dataset, 0, prefetch=2))
