"""Build the emoji data set: python -m m2m_jax.data.prepare --size=32 --directory=data

Draws it from the installed packages into DIRECTORY/emoji/32px (TFDS, array_record), licences beside it.
TFDS writes into an "incomplete" directory and renames it at the end, so an interrupted build leaves no half
data set behind. A data set that is there already is left as it is.

With --hands it builds the data set of many hands instead, DIRECTORY/emoji_hands/64px with --size=64, of the families
that npm packages in --packages hold (`make npm-emoji` fetches them), and of three that Python packages hold. Without
any npm package there are those three.
"""

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.data.options import EmojiDrawing

OPTIONS = define_flags(EmojiDrawing)


def main(argv):
    from m2m_jax.data.emoji.preparing import prepare_emoji, prepare_hands, summary

    options = OPTIONS()
    if options.hands:
        builder = prepare_hands(options.size, str(options.directory), str(options.packages))
    else:
        builder = prepare_emoji(options.size, str(options.directory))
    print(summary(builder))


if __name__ == "__main__":
    run_program(main)
