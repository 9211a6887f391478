"""Make splits that part no likeness: what looks alike, or is the same thing, falls into one split together.

Items are parted into connected components of whatever links them (equal subjects, pictures that are copies of each
other by `likeness.py`), and a component falls into a split by its name alone: by a threshold on a hash, so that
components that come or go later move no other.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


def connected_components(items: Iterable[str], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name the component of every item, by the component's least item in the order of strings.

    links: pairs of items that must not be parted, in any order, directly or over others.
    """
    parents = {item: item for item in items}

    def root(item: str) -> str:
        while parents[item] != item:
            parents[item] = item = parents[parents[item]]
        return item

    for one, other in links:
        first, second = sorted((root(one), root(other)))
        parents[second] = first
    return {item: root(item) for item in parents}


def split_by_component(
    components: Mapping[str, str], *, held_out_share: float = 0.1, largest: int | None = None
) -> dict[str, str]:
    """Split items: "validation" and "test" get about `held_out_share` of the components each, "train" the rest.

    components: item -> component, as from `connected_components`.
    largest: components of more items than this are training data, whatever their hash; None: no limit.
    """
    sizes: dict[Any, int] = defaultdict(int)
    for component in components.values():
        sizes[component] += 1

    def split(component: str) -> str:
        # Python's hash() differs from process to process; blake2s does not.
        place = int.from_bytes(hashlib.blake2s(component.encode(), digest_size=8).digest(), "big") / 2**64
        if (largest is not None and sizes[component] > largest) or place >= 2 * held_out_share:
            return TRAIN
        return TEST if place < held_out_share else VALIDATION

    return {item: split(component) for item, component in components.items()}


def mend_split(splits: Mapping[str, str], components: Mapping[str, str]) -> dict[str, str]:
    """Change a split that parts components to one that doesn't, so that nothing new is held out.

    A component of which anything trains goes to "train", one that lies in "validation" and "test" to "validation":
    models that were trained on the old split have seen nothing that the new one holds out, and nothing that they were
    chosen by is in "test".

    splits: item -> its split. components: item -> component.
    """
    found = defaultdict(set)
    for item, split in splits.items():
        found[components[item]].add(split)
    first = {component: next(split for split in SPLITS if split in within) for component, within in found.items()}
    return {item: first[components[item]] for item in splits}
