"""Writes captions to make image sets from: recombined annotations of emoji, see `emoji/recombination.py`.

    python -m m2m_jax.data.emoji_captions --output=data/emoji_captions.txt --num_captions=2400

They depend on --seed and --num_captions alone.
"""

import collections
from pathlib import Path

from absl import flags

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.program import run_program
from m2m_jax.data.emoji.recombination import SHARES, recombine
from m2m_jax.data.emoji.subjects import load_subjects

OUTPUT = flags.DEFINE_string("output", None, "The file to write, .txt, one caption a line.", required=True)
NUM_CAPTIONS = flags.DEFINE_integer("num_captions", 2400, "How many.")
SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")


def main(argv):
    del argv
    output = Path(OUTPUT.value)
    if output.suffix != ".txt":
        raise UserError(f"--output={output}: captions are written as .txt")
    captions = recombine(load_subjects(), NUM_CAPTIONS.value, SEED.value)
    with disk.errors(f"--output={output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        disk.write(output, "".join(f"{caption}\n" for _, caption in captions).encode())
    counts = collections.Counter(kind for kind, _ in captions)
    print(f"{output}: {len(captions)} captions ({', '.join(f'{kind}: {counts[kind]}' for kind in SHARES)})")


if __name__ == "__main__":
    run_program(main)
