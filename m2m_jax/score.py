"""Scores of sets, whoever made them, against real ones: position by position, beside floors and ceilings.

    python -m m2m_jax.score --generated=made --real=data:test --given=4 --output=scores \
        --encoders=efficientnet_lite0=data/efficientnet_lite0,pixels

Both are generated records or folders (m2m_jax.generate), folders with a folder for each set, its images in the order of
their names, or a data set and a split of it. Writes scores.json and one page, index.html, which opens from disk, and
prints a table. What the arms of a table are: `scoring/anchors.py`; from Python: `scoring/judging.py`; docs/scores.md.
"""

import sys

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.scoring.options import Scoring

OPTIONS = define_flags(Scoring)
UNMET = 3  # the exit code where --require is not met


def main(argv) -> int:
    options = OPTIONS()
    from m2m_jax.core import runtime
    from m2m_jax.scoring.judging import score_sets
    from m2m_jax.scoring.report import table

    runtime.start()
    scores = score_sets(options)
    print(table(scores))
    print(options.output / "index.html")
    unmet = scores.unmet()
    for line in unmet:
        print(line, file=sys.stderr)
    return UNMET if unmet else 0


if __name__ == "__main__":
    run_program(main)
