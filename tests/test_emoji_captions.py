"""Captions recombined from the emoji that are trained on: what they name, and what they never name."""

import collections

import pytest
from run_fixtures import run

from m2m_jax.building.caption_rules import CaptionRules
from m2m_jax.building.captions import clean_captions, read_captions
from m2m_jax.core.errors import UserError
from m2m_jax.data.emoji.artwork import STYLES
from m2m_jax.data.emoji.recombination import SHARES, recombine
from m2m_jax.data.emoji.subjects import SKIN_TONES, load_subjects

NUM_CAPTIONS = 2400


@pytest.fixture(scope="module")
def subjects():
    return load_subjects()


@pytest.fixture(scope="module")
def captions(subjects):
    return recombine(subjects, NUM_CAPTIONS, seed=0)


def _names(subjects, splits) -> set[str]:
    return {variant.name for subject in subjects if subject.split in splits for variant in subject.variants}


def test_no_tag_names_a_subject_that_is_held_out(subjects, captions):
    held_out = _names(subjects, ("validation", "test"))
    known = _names(subjects, ("train",)) | {subject.subgroup for subject in subjects} | set(STYLES)
    known |= set(SKIN_TONES.values())
    for _, caption in captions:
        tags = caption.split(", ")
        assert not held_out.intersection(tags) and known.issuperset(tags), caption


def test_captions_are_of_the_documented_kinds(subjects, captions):
    counts = collections.Counter(kind for kind, _ in captions)
    assert counts == {kind: round(share * NUM_CAPTIONS) for kind, share in SHARES.items()}
    assert len({caption for _, caption in captions}) == NUM_CAPTIONS
    pictures = {}  # what emoji show: name -> subgroup
    for subject in subjects:
        pictures |= {variant.name: subject.subgroup for variant in subject.variants}
    for kind, caption in captions:
        name, _, rest = caption.rpartition(", ")
        shown = (
            (name in pictures and rest in STYLES)
            or caption in pictures
            or (name in pictures.values() and rest in STYLES)
        )
        if kind in ("true", "content", "style row"):
            assert shown, caption
        elif kind == "foreign subgroup":
            name, subgroup, _ = caption.split(", ")
            assert pictures[name] != subgroup, caption
        else:
            assert not shown, caption


def test_they_depend_on_the_seed_alone(subjects, captions):
    assert recombine(subjects, NUM_CAPTIONS, seed=0) == captions
    assert recombine(subjects, NUM_CAPTIONS, seed=1) != captions


def test_two_names_stand_in_for_what_there_is_too_little_of(subjects):
    captions = recombine(subjects, 20_000, seed=0)
    counts = collections.Counter(kind for kind, _ in captions)
    assert len({caption for _, caption in captions}) == 20_000
    assert counts["style row"] < 500 < counts["two names"]


@pytest.mark.parametrize(("number", "seed"), [(0, 0), (1_000_001, 0), (5, -1)])
def test_numbers_that_cannot_be_meant_are_refused(subjects, number, seed):
    with pytest.raises(UserError, match="must be"):
        recombine(subjects, number, seed)


def test_the_program_writes_what_the_builder_reads(tmp_path):
    output = tmp_path / "made" / "captions.txt"
    printed = run("data.emoji_captions", f"--output={output}", "--num_captions=100")
    assert "100 captions" in printed.out
    kept, dropped = clean_captions(read_captions(output), CaptionRules())
    assert len(kept) == 100 and not dropped
    assert [path.name for path in output.parent.iterdir()] == ["captions.txt"]
    refused = run("data.emoji_captions", f"--output={tmp_path / 'captions.csv'}")
    assert "captions are written as .txt" in refused.err and refused.code == 2
