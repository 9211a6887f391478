"""What is dropped from a generated set: images without content, images that are there already, and what a filter of the
user's own refuses."""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, option

HASH_BITS = 64
# (images uint8 [n, S, S, 3], caption) -> bool [n], which of them to keep.
SafetyFilter = Callable[[np.ndarray, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SetRules(Options):
    """Which images of a set are kept, and which sets. An image counts as dropped by the first rule that it breaks.

    Example:
        clean_set(images_nhwc, "a cat", SetRules(near_duplicate_bits=4), None)  # ([0, 2], {"near_duplicate_bits": 1})
    """

    blank_std: float = option(
        "Least standard deviation over the pixels of an image, in the channel that varies most, of 255; 0 keeps all.",
        2.0,
        low=0,
        high=128,  # the largest that pixels can have
    )
    drop_duplicates: bool = option("Keep the first of images whose pixels are all the same.", True)
    near_duplicate_bits: int = option(
        "Keep the first of images whose difference hashes (64 bits) differ in fewer bits than this; 0 keeps all. "
        "Drawings on white ground have few edges, and hashes that are close by chance.",
        0,
        low=0,
        high=HASH_BITS,
    )
    min_images: int = option("Sets with fewer images left are dropped.", 1, low=1)
    safety_filter: str = option(
        "module:function of a filter, Python that you have installed and trust: it is run, on what the other rules "
        "left, one set at a time, as building/cleaning.py: SafetyFilter says.",
        "",
    )

    def load_filter(self) -> SafetyFilter | None:
        """Return the function that `safety_filter` names, or None. Raises UserError where there is no such function."""
        if not self.safety_filter:
            return None
        module, _, name = self.safety_filter.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"safety_filter={self.safety_filter}: not a module:function ({error})") from error
        if not callable(found):
            raise UserError(f"safety_filter={self.safety_filter}: {name} cannot be called")
        return found


def clean_set(
    images_nhwc: np.ndarray, caption: str, rules: SetRules, safety_filter: SafetyFilter | None
) -> tuple[list[int], collections.Counter[str]]:
    """Return which images of a set, uint8 [n, S, S, 3], to keep, by number, and {rule: images that it dropped}.

    safety_filter: `rules.load_filter()`. Raises UserError where it returns something else than it should.
    """
    dropped: collections.Counter[str] = collections.Counter()
    kept: list[int] = []
    pixels: set[bytes] = set()
    hashes: list[np.ndarray] = []
    for number, image_hwc in enumerate(images_nhwc):
        if image_hwc.std(axis=(0, 1)).max() < rules.blank_std:
            dropped["blank_std"] += 1
            continue
        if rules.drop_duplicates:
            data = image_hwc.tobytes()
            if data in pixels:
                dropped["drop_duplicates"] += 1
                continue
            pixels.add(data)
        if rules.near_duplicate_bits:
            bits = difference_hash(image_hwc)
            if any(np.count_nonzero(bits != other) < rules.near_duplicate_bits for other in hashes):
                dropped["near_duplicate_bits"] += 1
                continue
            hashes.append(bits)
        kept.append(number)
    if safety_filter is not None and kept:
        keep_n = np.asarray(safety_filter(images_nhwc[kept], caption))
        if keep_n.shape != (len(kept),) or keep_n.dtype != bool:
            raise UserError(
                f"safety_filter={rules.safety_filter} returned {keep_n.dtype} {list(keep_n.shape)} for {len(kept)} "
                f"images; it must return bool [{len(kept)}], true for those to keep"
            )
        dropped["safety_filter"] += int((~keep_n).sum())
        kept = [number for number, keep in zip(kept, keep_n, strict=True) if keep]
    return kept, +dropped


def difference_hash(image_hwc: np.ndarray) -> np.ndarray:
    """Return bool [64]: where the image, as 9 x 8 grey pixels, grows brighter from left to right ("dHash")."""
    grey_hw = np.asarray(Image.fromarray(image_hwc).convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return (grey_hw[:, 1:] > grey_hw[:, :-1]).ravel()
