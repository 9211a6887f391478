"""Captions to make image sets from, recombined from the annotations of the emoji that are trained on.

A caption is a list of tags as in the emoji data set, "name, subgroup, style", of which any may be missing. Six kinds:

| share | caption                                        | example                                            |
|-------|------------------------------------------------|----------------------------------------------------|
| 25 %  | a name, with or without skin tone, and a style | cat face with tears of joy, twemoji                |
| 20 %  | a name alone: content sets, in any style       | pizza                                              |
| 15 %  | a subgroup and a style: style rows             | food fruit, openmoji                               |
| 10 %  | a skin tone on what has none                   | steaming bowl, dark skin tone, twemoji             |
| 15 %  | a name in another's subgroup                   | saxophone, animal bird, noto-bold                  |
| 15 %  | two names                                      | cat face, slice of pizza, openmoji                 |

The last three describe what no emoji shows; half of those of the last carry a style. No tag is the name of a subject
of the validation or the test split, nor of a variant of one. All captions differ; where there are no more of a kind,
there are more of two names.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.data.emoji.artwork import STYLES
from m2m_jax.data.emoji.subjects import SKIN_TONES, Subject, Variant

SHARES = {
    "true": 0.25,
    "content": 0.2,
    "style row": 0.15,
    "foreign skin tone": 0.1,
    "foreign subgroup": 0.15,
    "two names": 0.15,
}
MAX_CAPTIONS = 1_000_000
# The font draws every tone as the default one.
_STYLES_WITH_SKIN_TONES = tuple(style for style in STYLES if not style.startswith("noto"))


def recombine(subjects: Sequence[Subject], num_captions: int, seed: int) -> list[tuple[str, str]]:
    """Return [(kind, caption)] in random order, all captions different. Only subjects of the training split are named.

    Raises UserError for a number that is not 1 to MAX_CAPTIONS, or a negative seed.
    """
    if not 1 <= num_captions <= MAX_CAPTIONS:
        raise UserError(f"--num_captions={num_captions}: must be 1 to {MAX_CAPTIONS}")
    if seed < 0:
        raise UserError(f"--seed={seed}: must be at least 0")
    held_out = {variant.name for subject in subjects if subject.split != "train" for variant in subject.variants}
    trained = [subject for subject in subjects if subject.split == "train"]
    rng = np.random.default_rng(seed)
    made: dict[str, str] = {}  # caption -> kind
    for kind, candidates in _candidates(trained, held_out, rng).items():
        # The last kind, of which there are millions, makes up for those of which there are too few.
        wanted = num_captions if kind == "two names" else len(made) + round(SHARES[kind] * num_captions)
        while len(made) < wanted and (caption := next(candidates, None)) is not None:
            made.setdefault(caption, kind)
    captions = [(kind, caption) for caption, kind in made.items()]
    return [captions[i] for i in rng.permutation(len(captions))]


def _candidates(subjects: Sequence[Subject], held_out: set[str], rng: np.random.Generator) -> dict[str, Iterator[str]]:
    """Yield captions of each kind, in random order, some of them more than once."""
    # Commas part tags: a family of "man, woman, boy" would be three, and one of them another subject's name.
    usable = [(subject, variant) for subject in subjects for variant in subject.variants if "," not in _bare(variant)]
    neutral = [(subject, variant.name) for subject, variant in usable if not variant.has_skin_tone]
    toned = {subject.subject_id for subject in subjects if any(variant.has_skin_tone for variant in subject.variants)}
    names = [name for _, name in neutral]
    toneless = [name for subject, name in neutral if subject.subject_id not in toned]
    subgroups = sorted({subject.subgroup for subject in subjects} - held_out)
    true = [
        (variant.name, style)
        for _, variant in usable
        for style in (_STYLES_WITH_SKIN_TONES if variant.has_skin_tone else STYLES)
    ]

    def shuffled(tags: Sequence[tuple[str, ...]]) -> Iterator[str]:
        return (", ".join(tags[i]) for i in rng.permutation(len(tags)))

    def one_of(values: Sequence):
        return values[int(rng.integers(len(values)))]

    def foreign_subgroups() -> Iterator[str]:
        for i in rng.permutation(len(neutral)):
            subject, name = neutral[i]
            yield ", ".join((name, one_of([other for other in subgroups if other != subject.subgroup]), one_of(STYLES)))

    def pairs() -> Iterator[str]:
        while True:
            first, second = rng.choice(len(names), 2, replace=False)
            yield ", ".join((names[first], names[second], *([one_of(STYLES)] if rng.random() < 0.5 else [])))

    return {
        "true": shuffled(true),
        "content": shuffled([(name,) for name in names]),
        "style row": shuffled(list(itertools.product(subgroups, STYLES))),
        "foreign skin tone": shuffled(list(itertools.product(toneless, SKIN_TONES.values(), _STYLES_WITH_SKIN_TONES))),
        "foreign subgroup": foreign_subgroups(),
        "two names": pairs(),
    }


def _bare(variant: Variant) -> str:
    """Return the name without the skin tone."""
    return variant.name.rpartition(", ")[0] if variant.has_skin_tone else variant.name
