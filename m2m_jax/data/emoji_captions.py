"""Write captions to make image sets from: recombined annotations of emoji, see `emoji/recombination.py`.

    python -m m2m_jax.data.emoji_captions --output=data/emoji_captions.txt --num_captions=2400

They depend on --seed and --num_captions alone.
"""

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.data.options import EmojiCaptions

OPTIONS = define_flags(EmojiCaptions)


def main(argv):
    from m2m_jax.data.emoji.caption_file import write_captions

    options = OPTIONS()
    counts = write_captions(options)
    kinds = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
    print(f"{options.output}: {sum(counts.values())} captions ({kinds})")


if __name__ == "__main__":
    run_program(main)
