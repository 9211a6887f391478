"""Make the emoji splits again: python -m m2m_jax.data.emoji_splits --packages=data/npm

Writes, beside the code that reads them, `emoji/subjects.tsv`: the subjects of all families of `emoji/hands.py` with
their splits, and `emoji/moved_subjects.txt`: those subjects of `emoji/subjects.py` whose split changes so that nothing
held out looks like something that trains. Both are committed; this is how they were made. Needs all npm packages of
`make npm-emoji`, and some minutes.
"""

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.data.options import EmojiSplits

OPTIONS = define_flags(EmojiSplits)


def main(argv):
    from m2m_jax.data.emoji import splitting, subjects, table

    counts, num_moved = splitting.write_splits(OPTIONS().packages)
    print(f"{table.FILE}: {counts}; {subjects.MOVED_FILE}: {num_moved} subjects")


if __name__ == "__main__":
    run_program(main)
