"""Which images of a set stand in the stack, and which of them each may see: the one mask of the project."""

import dataclasses

import numpy as np
from jaxtyping import Bool

CLEAN_SEES = ("preceding", "itself")


@dataclasses.dataclass(frozen=True)
class SetLayout:
    """The images of one set as the network sees them, stacked as `[clean; noised]` (M2M-Self) or `[noised]` (M2M-DINO).

    An image is named by its position in the set, counted from 0. A position may stand in both branches (training:
    every image is denoised, and its clean version is context for the later ones) and a noised position may
    stand more than once (evaluation).

    Static and hashable: a layout is part of what is compiled.

    Attributes:
      clean: set positions of the clean images, the only ones whose features become keys and values.
      noised: set positions of the images that are denoised.
      clean_sees: "preceding": a clean image sees the clean images up to and including itself; "itself": itself
        alone, which makes the context free of order. The paper does not say.
      encoded: the clean images are keys only, tokens of an image encoder (M2M-DINO): the stack is the noised images.

    Example:
        SetLayout.training(4).mask_qk()  # bool [7, 3], the table in `allowed`
    """

    clean: tuple[int, ...]
    noised: tuple[int, ...]
    clean_sees: str = "preceding"
    encoded: bool = False

    def __post_init__(self):
        if self.clean_sees not in CLEAN_SEES:
            raise ValueError(f"clean_sees must be one of {CLEAN_SEES}, not {self.clean_sees!r}")

    @classmethod
    def training(cls, num_images: int, clean_sees: str = "preceding", encoded: bool = False) -> "SetLayout":
        """Return the layout in which every image is denoised given all before it.

        The last image is context to none: it has no clean copy.
        """
        return cls(tuple(range(num_images - 1)), tuple(range(num_images)), clean_sees, encoded)

    @classmethod
    def sampling(cls, num_context: int, clean_sees: str = "preceding", encoded: bool = False) -> "SetLayout":
        """Return the layout in which one image is denoised given `num_context` finished ones."""
        return cls(tuple(range(num_context)), (num_context,), clean_sees, encoded)

    @property
    def stacked_clean(self) -> tuple[int, ...]:
        """Set positions of the clean images that stand in the stack."""
        return () if self.encoded else self.clean

    @property
    def num_images(self) -> int:
        """Images in the stack."""
        return len(self.stacked_clean) + len(self.noised)

    def mask_qk(self) -> Bool[np.ndarray, "q k"]:
        """Return the mask between images: bool [images of the stack, clean], True where a query sees a key image."""
        query_is_noised = np.arange(self.num_images)[:, None] >= len(self.stacked_clean)
        query_position = np.asarray(self.stacked_clean + self.noised, int)[:, None]
        key_position = np.asarray(self.clean, int)[None, :]
        return allowed(query_is_noised, query_position, key_position, self.clean_sees)

    def token_mask_qk(self, tokens_per_query: int, tokens_per_key: int) -> Bool[np.ndarray, "qt ks"]:
        """Return `mask_qk` at token granularity, for so many tokens an image, for backends that take no coarser one."""
        return self.mask_qk().repeat(tokens_per_query, 0).repeat(tokens_per_key, 1)


def allowed(query_is_noised, query_position, key_position, clean_sees: str = "preceding"):
    """Say whether a query image sees a key image: THE mask predicate, from which every form of the mask is made.

    Keys are always clean: nothing sees a noised image except that image itself, through self-attention.

      noised i -> clean j   for j < i     (the factor p(x_i | x_<i) of the model)
      clean  i -> clean j   for j <= i, or j = i alone

    In training, `SetLayout.training(4)`, the stack of a set of four images is [clean 0 1 2; noised 0 1 2 3], and its
    mask has a row for each of them and a column for each clean image (right: where clean images see "itself"):

                 clean  0 1 2                    0 1 2
        clean  0        1 0 0                    1 0 0
        clean  1        1 1 0                    0 1 0
        clean  2        1 1 1                    0 0 1
        noised 0        0 0 0    the first       0 0 0
        noised 1        1 0 0                    1 0 0
        noised 2        1 1 0                    1 1 0
        noised 3        1 1 1    the last        1 1 1

    The last image is context to none, so it has no clean copy. In sampling, `SetLayout.sampling(3)`, there are the rows
    of clean 0 1 2 and of noised 3; with a cache, the last row alone.

    As the clean branch sees nothing noised, its keys and values do not depend on the image being made and can be
    computed once per finished image, exactly. Block-diffusion language models (BD3-LM, arXiv 2503.09573) and
    ACDiT (arXiv 2412.07720) use the same logic.

    Args:
      query_is_noised, query_position, key_position: booleans and integers, or arrays of them (NumPy or JAX), which are
        broadcast against each other.
      clean_sees: "preceding" or "itself".
    """
    query_is_clean = query_is_noised ^ True  # `~` makes an integer of a Python bool
    clean_to_clean = key_position <= query_position if clean_sees == "preceding" else key_position == query_position
    return (query_is_noised & (key_position < query_position)) | (query_is_clean & clean_to_clean)
