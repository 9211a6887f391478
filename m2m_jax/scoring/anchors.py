"""What a figure is compared with: the same figure of real sets, of sets torn apart, and of a copier.

An arm is a `Features` whose judged images come from elsewhere:

    ours        the images that were made
    real        the real images of the same places
    shuffled    real images again, each from another set than its place
    copy        the last of the given images, again and again: a cheat that likenesses alone would praise

Figures that are means over sets are those of all N sets. Figures of distributions (Fréchet distance, KID, MIND) judge
images of one half of the sets, against the real images of the other half, in every arm: so "real" is the distance
between disjoint real sets, and all arms have the same N, which is half of what there is. They are means over random
halves, whose spread gives their intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from m2m_jax.scoring.metrics import Features

ARMS = {
    "ours": "the generated images",
    "real": "the real images of the same places",
    "shuffled": "real images, each from another set",
    "copy": "the last given image, again and again",
}
SPLITS = 10  # into halves
NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})


def arms(features: Features, beside: Mapping[str, np.ndarray] = NOTHING, seed: int = 0) -> dict[str, Features]:
    """Return {name in `ARMS`: features}; without "copy" where nothing was given.

    Args:
      features: of what was made, with the real images.
      beside: what else is known of the real sets, where it is: "given_nmc", "given_nmhwc", the given images of the real
        sets, which are other sets' where what was made has no real counterpart; and logits of a classifier,
        "real_nkl" of the real images and "given_nml" of the given ones of what was made.
      seed: of the shuffle.
    """
    shuffled_nk = shuffle(features.num_sets, _num_positions(features), seed)
    given = {name: beside.get(name, getattr(features, name)) for name in ("given_nmc", "given_nmhwc")}

    def torn(real_nk, _):
        return real_nk[shuffled_nk, np.arange(real_nk.shape[1])[None]]

    def copied(real_nk, given_nm):
        return np.broadcast_to(given_nm[:, -1:], real_nk.shape)

    of_real = dataclasses.replace(features, **given)
    found = {"ours": features, "real": _judging(of_real, lambda real_nk, _: real_nk, beside)}
    found["shuffled"] = _judging(of_real, torn, beside)
    if features.has("given_nmc") or features.has("given_nmhwc"):
        found["copy"] = _judging(features, copied, beside)
    return found


def shuffle(num_sets: int, num_positions: int, seed: int) -> np.ndarray:
    """Return from which set each place of a shuffled set is taken: int [n, k], never from its own.

    No two places of a set are of one set, as far as there are enough sets; every image is used once.
    """
    rng = np.random.default_rng(seed)
    others = max(num_sets - 1, 1)
    offset_k = np.concatenate([rng.permutation(others) for _ in range(-(-num_positions // others))])[:num_positions] + 1
    order_n = rng.permutation(num_sets)
    place_n = np.argsort(order_n)
    return order_n[(place_n[:, None] + offset_k[None]) % num_sets]


def halves(num_sets: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield `SPLITS` random pairs of disjoint halves of sets, their indices."""
    half = num_sets // 2
    for split in range(SPLITS):
        order = np.random.default_rng([seed, split]).permutation(num_sets)
        yield order[:half], order[half : 2 * half]


def arms_of_half(
    features: Features, beside: Mapping[str, np.ndarray], judged_s: np.ndarray, real_s: np.ndarray
) -> dict[str, Features]:
    """Return `arms` of some sets, to be compared with the real images of others. Sets are shuffled among themselves."""
    of_half = {
        field.name: value[judged_s]
        for field in dataclasses.fields(features)
        if isinstance(value := getattr(features, field.name), np.ndarray) and not field.name.startswith("training")
    }
    found = arms(dataclasses.replace(features, **of_half), {name: x[judged_s] for name, x in beside.items()})
    reals = {
        name: value[real_s] for name in ("real_nkc", "real_nkhwc") if (value := getattr(features, name)) is not None
    }
    return {arm: dataclasses.replace(of_arm, **reals) for arm, of_arm in found.items()}


def _judging(
    features: Features, choose: Callable[[np.ndarray, Any], np.ndarray], beside: Mapping[str, np.ndarray]
) -> Features:
    """Return features that judge other images: `choose` makes them, [n, k, ...], of the real and the given ones."""
    found: dict[str, Any] = {
        "made_nkc": (features.real_nkc, features.given_nmc),
        "made_nkhwc": (features.real_nkhwc, features.given_nmhwc),
        "logits_nkl": (beside.get("real_nkl"), beside.get("given_nml")),
    }
    judges: dict[str, Any] = {
        name: None if real is None else choose(real, given) for name, (real, given) in found.items()
    }
    return dataclasses.replace(features, **judges)


def _num_positions(features: Features) -> int:
    made = features.made_nkhwc if features.made_nkc is None else features.made_nkc
    return 0 if made is None else made.shape[1]
