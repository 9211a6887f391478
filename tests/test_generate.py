"""Generated sets: whole, each once, the same however they were made, and refused where they were made otherwise."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from data_fixtures import write_image_folder, write_latents
from fuzz_targets import _small_sampler
from model_fixtures import random_params
from run_fixtures import ROOT

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image
from m2m_jax.data import generated
from m2m_jax.data.source import SOURCES, open_named
from m2m_jax.data.sources.precomputed import PrecomputedSource
from m2m_jax.models.unet import unet_structure
from m2m_jax.sampling.bundle_writer import write_bundle
from m2m_jax.sampling.generation import generate_sets, set_seed
from m2m_jax.sampling.generation_options import SetGeneration

SETS, GIVEN, MADE = 11, 2, 2


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    made = _small_sampler(tmp_path_factory.mktemp("model"))
    settings = dataclasses.replace(made.settings, steps=2, stepper="ddim", cache_size=4)
    schedule = dataclasses.replace(made.schedule, prediction_type="sample")  # others magnify what is rounded
    params = random_params(unet_structure(made.unet_config)[1])
    return dataclasses.replace(made, unet_params=params, settings=settings, schedule=schedule)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "sets", num_sets=SETS, images_per_set=3)


def options(data, output, **changes) -> SetGeneration:
    fields = {"given": GIVEN, "num_images": MADE, "sets_at_once": 2, "sets_per_shard": 3}
    return SetGeneration(checkpoint="no run", data=str(data), output=output, **(fields | changes))


def make(sampler, data, output, **changes) -> pathlib.Path:
    assert generate_sets(options(data, output, **changes), sampler=sampler, report=lambda line: None) == 0
    return output


@pytest.fixture(scope="module")
def whole(sampler, data, tmp_path_factory):
    """Made at one go, on one device."""
    return make(sampler, data, tmp_path_factory.mktemp("made") / "whole")


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(record) -> np.ndarray:
    return np.stack([np.asarray(decode_image(data, "an image").convert("RGB")) for data in record.images])


def test_records_hold_what_was_given_and_what_the_sampler_makes_of_it(sampler, data, whole):
    made, sets = open_named(str(whole)), open_named(str(data))
    assert len(made) == SETS and made.split == "all" and list(made.num_images) == [GIVEN + MADE] * SETS
    for number in (0, 7):
        assert made[number].set_id == sets[number].set_id
        given = sampler.read([decode_image(sets[number].images[i], "an image") for i in range(GIVEN)])
        expected = sampler.sample_sets([given], MADE, np.array([set_seed(0, number)], np.uint32))[0]
        found = pixels(made[number])
        np.testing.assert_array_equal(found[:GIVEN], given)
        assert np.abs(found[GIVEN:].astype(int) - expected).max() <= 1  # in a batch of another size: what is rounded
    by = generated.read_manifest(whole).made_by
    assert by["model"]["sha256"] == sampler.fingerprint and by["model"]["settings"]["steps"] == 2
    assert by["seed"] == 0 and len(by["data"]["sha256"]) == 64 and by["conditioned_on"] == ""


def test_devices_and_processes_change_no_byte(sampler, data, whole, tmp_path):
    several = dataclasses.replace(sampler, devices=tuple(jax.local_devices()[:2]))
    for process in (1, 0):
        make(several, data, tmp_path / "shared", process_index=process, process_count=2)
    assert files(tmp_path / "shared") == files(whole)


def test_what_breaks_again_and_again_ends_as_if_it_had_not(sampler, data, whole, tmp_path):
    calls = []

    class Breaking(type(sampler)):
        def sample_sets(self, *arguments, **more):
            calls.append(1)
            if len(calls) in (2, 4, 5):
                raise RuntimeError("killed")
            return super().sample_sets(*arguments, **more)

    breaking = Breaking(**{field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)})
    for _ in range(3):
        with pytest.raises(RuntimeError, match="killed"):
            make(breaking, data, tmp_path / "made")
    make(breaking, data, tmp_path / "made")
    assert files(tmp_path / "made") == files(whole)


def test_folders_hold_the_same_images(sampler, data, whole, tmp_path):
    made = make(sampler, data, tmp_path / "made", format="folders")
    assert {path.name for path in made.iterdir()} == {"generated.json", *(f"set{i:02d}" for i in range(SETS))}
    records, folders = open_named(str(whole)), open_named(str(made))
    for number in range(SETS):
        assert list(folders[number].images) == list(records[number].images)
    before = files(made)
    make(sampler, data, made, format="folders")
    assert files(made) == before


def test_a_part_is_chosen_alike_and_keeps_its_noise(sampler, data, whole, tmp_path):
    some = open_named(str(make(sampler, data, tmp_path / "some", num_sets=4)))
    all_of_them = {record.set_id: record for record in map(open_named(str(whole)).__getitem__, range(SETS))}
    assert len(some) == 4
    for record in map(some.__getitem__, range(4)):
        close = pixels(record).astype(int) - pixels(all_of_them[record.set_id])
        assert np.abs(close).max() <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "made_by.seed was 0, and now is 1; name another --output"),
        ({"num_images": 1}, "num_images was 2, and now is 1"),
        ({"sets_per_shard": 4}, "sets_per_shard was 3"),
    ],
)
def test_other_sets_in_the_same_folder_are_refused(changes, words, sampler, data, whole):
    with pytest.raises(UserError, match=words):
        make(sampler, data, whole, **changes)


def test_other_data_and_other_weights_are_refused(sampler, data, whole, tmp_path):
    other = write_image_folder(tmp_path / "sets", num_sets=SETS, images_per_set=3)
    first = sorted((other / "set00").iterdir())[0]
    first.write_bytes((other / "set01" / first.name).read_bytes())
    with pytest.raises(UserError, match=r"made_by\.data\.sha256"):
        make(sampler, other, whole)
    params = {name: x * 1.01 for name, x in sampler.unet_params.items()}
    with pytest.raises(UserError, match=r"made_by\.model\.sha256"):
        make(dataclasses.replace(sampler, unet_params=params), data, whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_sets": 12}, "has 11 sets of at least 2 images: lower --num_sets"),
        ({"given": 4}, "has 0 sets of at least 4 images: lower --given"),
        ({"num_images": 24}, "a set holds up to 25 images"),
        ({"kinds": ("style",)}, "--kinds=style: .* has folder"),
        ({"data": "nowhere:test"}, "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_made_is_refused(changes, words, sampler, data, tmp_path):
    with pytest.raises(UserError, match=words):
        make(sampler, changes.pop("data", data), tmp_path / "made", **changes)
    assert not (tmp_path / "made").exists()


def test_a_folder_with_other_files_is_refused(sampler, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, not generated sets"):
        make(sampler, data, tmp_path)


def test_a_split_is_named_after_a_colon(data):
    assert len(open_named(f"{data}:train")) < SETS == len(open_named(f"{data}:all"))
    with pytest.raises(UserError, match="split 'tests'"):
        open_named(f"{data}:tests")


def test_a_data_set_is_named_by_its_directory_or_by_a_folder_within(tmp_path, monkeypatch):
    latents = write_latents(tmp_path / "latents", splits=("train", "validation"))
    assert open_named(f"{latents}:validation").split == "validation"
    with pytest.raises(UserError, match=r"latents has several splits \(train, validation\): name one"):
        open_named(str(latents))
    (tmp_path / "latents" / "within").mkdir()

    class Within(PrecomputedSource):
        """Two data sets of one directory, each in a folder of its own."""

        @classmethod
        def find(cls, path, *, follow_links=False):
            found = super().find(path) if path == latents else []
            for number, source in enumerate(found):
                source.split, source.name = "all", f"{path / ('within', 'other')[number]} (all)"
            return found

    monkeypatch.setitem(SOURCES._registered, "precomputed", Within)
    assert open_named(f"{latents / 'within'}:all").name == f"{latents / 'within'} (all)"
    with pytest.raises(UserError, match=r"is in several data sets: name one of .*within:all, .*other:all"):
        open_named(f"{latents}:all")


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes(sampler, data, tmp_path):
    (tmp_path / "bundle").mkdir()
    write_bundle(sampler, tmp_path / "bundle")
    flags = [f"--checkpoint={tmp_path / 'bundle'}", f"--data={data}", f"--given={GIVEN}", f"--num_images={MADE}"]
    command = [sys.executable, "-m", "m2m_jax.generate", *flags, "--sets_per_shard=1", "--sets_at_once=1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def start(output: pathlib.Path) -> subprocess.Popen:
        return subprocess.Popen([*command, f"--output={output}"], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)

    def shards(output: pathlib.Path) -> int:
        return len(list(output.glob("*.array_record")))

    assert start(tmp_path / "whole").wait() == 0
    killed = 0
    for _ in range(10):
        process, there = start(tmp_path / "made"), shards(tmp_path / "made")
        while process.poll() is None and shards(tmp_path / "made") == there:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 9  # the last may have ended by itself
    assert start(tmp_path / "made").wait() == 0
    assert files(tmp_path / "made") == files(tmp_path / "whole")
