"""A run that is killed, as in tests/soak.py, which `make soak` runs for 20 kills."""

import pathlib

import jax
import pytest
from compare_runs import differences, examples
from killed_runs import Launch, Moment, killed_run, table, unbroken_run
from run_fixtures import one_level_arguments

STEPS = 8
MOMENTS = (
    Moment(step=0, share=0.2),
    Moment(step=2, in_write=True),  # of the checkpoint of step 3
    Moment(step=7),  # the checkpoint of step 6 has begun, so that of step 3 is whole
)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """One device, and a U-Net of one level: five starts and three kills."""
    arguments = (
        *one_level_arguments(tmp_path_factory),
        f"--config.train.steps={STEPS}",
        "--config.eval.every=5",
    )
    return Launch(arguments, processes=1, devices=1, cache=pathlib.Path(jax.config.jax_compilation_cache_dir))


def test_killed_while_it_starts_writes_and_trains_a_run_ends_bit_for_bit_as_if_it_were_not(launch, tmp_path):
    unbroken = unbroken_run(launch, tmp_path / "unbroken")
    kills = killed_run(launch, tmp_path / "killed", unbroken, MOMENTS)
    print(table(kills))
    assert [bool(kill.step) for kill in kills] == [False, True, True]
    assert kills[1].unfinished.startswith("3") and kills[1].resumed == 0
    assert kills[2].resumed in (3, 6)
    assert not differences(tmp_path / "unbroken", tmp_path / "killed", STEPS)
    # Each example once, in the order of their indices.
    assert [index for of_step in examples(tmp_path / "killed").values() for index in of_step] == list(range(8 * STEPS))
