"""A file of recombined captions, for `m2m_jax.data.build_mis`."""

from __future__ import annotations

import collections

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.data.emoji.recombination import SHARES, recombine
from m2m_jax.data.emoji.subjects import load_subjects
from m2m_jax.data.options import EmojiCaptions


def write_captions(options: EmojiCaptions) -> dict[str, int]:
    """Write captions, one a line, and return how many there are of each kind (`recombination.SHARES`).

    Raises:
      UserError: the file's name does not end in .txt, it cannot be written, or no such number can be made.
    """
    output = options.output
    if output.suffix != ".txt":
        raise UserError(f"--output={output}: captions are written as .txt")
    captions = recombine(load_subjects(), options.num_captions, options.seed)
    with disk.errors(f"--output={output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        disk.write(output, "".join(f"{caption}\n" for _, caption in captions).encode())
    counts = collections.Counter(kind for kind, _ in captions)
    return {kind: counts[kind] for kind in SHARES}
