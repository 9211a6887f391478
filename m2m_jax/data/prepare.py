"""Build a data set of installed artwork: python -m m2m_jax.data.prepare --name=emoji --size=32 --directory=data

Draws it into DIRECTORY/NAME/32px (TFDS, array_record), licences beside it. TFDS writes into an "incomplete" directory
and renames it at the end, so an interrupted build leaves no half data set behind. A data set that is there already is
left as it is.

    emoji         three families of emoji, of Python packages that are installed
    emoji_hands   ten hands, of npm packages (`make npm-emoji` fetches them); without any, three of Python packages
    cards         thirty decks of playing cards, of a Debian package (`make debian-cards` fetches it)
"""

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.data.options import Drawing

OPTIONS = define_flags(Drawing)


def main(argv):
    from m2m_jax.data.preparing import prepare, summary

    options = OPTIONS()
    packages = str(options.packages) if options.packages else None
    print(summary(prepare(options.name, options.size, str(options.directory), packages)))


if __name__ == "__main__":
    run_program(main)
