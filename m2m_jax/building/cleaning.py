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

HASH_BITS = 64
# (images uint8 [n, S, S, 3], caption) -> bool [n], which of them to keep.
SafetyFilter = Callable[[np.ndarray, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SetRules:
    """Which images of a set are kept, and which sets. An image counts as dropped by the first rule that it breaks.

    Attributes:
      blank_std: least standard deviation over the pixels, in the channel that varies most, of 255; 0 keeps all.
      drop_duplicates: keep the first of images whose pixels are all the same.
      near_duplicate_bits: keep the first of images whose difference hashes (see `difference_hash`) differ in fewer bits
        than this; 0 keeps all. Drawings on white ground have few edges, and hashes that are close by chance.
      min_images: sets with fewer left are dropped.
      safety_filter: "module:function" of a `SafetyFilter`, Python that the user has installed and trusts: it is run.
        It sees what the other rules left, one set at a time.
    """

    blank_std: float = 2.0
    drop_duplicates: bool = True
    near_duplicate_bits: int = 0
    min_images: int = 1
    safety_filter: str = ""

    def __post_init__(self):
        if not 0 <= self.blank_std <= 128:
            raise UserError(f"blank_std={self.blank_std}: must be 0 to 128, the largest that pixels can have")
        if not 0 <= self.near_duplicate_bits <= HASH_BITS:
            raise UserError(f"near_duplicate_bits={self.near_duplicate_bits}: must be 0 to {HASH_BITS}")
        if self.min_images < 1:
            raise UserError(f"min_images={self.min_images}: must be at least 1")

    def load_filter(self) -> SafetyFilter | None:
        """The function that `safety_filter` names. Raises UserError where there is none."""
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
    """Images of one set, uint8 [n, S, S, 3] -> (the numbers of those to keep, {rule: images that it dropped}).

    safety_filter: `rules.load_filter()`. Raises UserError where it returns something else than it should.
    """
    dropped: collections.Counter[str] = collections.Counter()
    kept: list[int] = []
    pixels, hashes = set(), []
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
    """bool [64]: where the image, as 9 x 8 grey pixels, grows brighter from left to right ("dHash")."""
    grey_hw = np.asarray(Image.fromarray(image_hwc).convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return (grey_hw[:, 1:] > grey_hw[:, :-1]).ravel()
