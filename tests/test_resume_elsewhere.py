"""One run on other numbers of processes and devices in turn: the same examples in the same order, the same losses."""

import pathlib

import jax
import numpy as np
import pytest
from compare_runs import examples, losses
from killed_runs import Launch
from run_fixtures import one_level_arguments, run

STEPS = 8
# (processes, devices of each, the checkpoint after which all are killed); the last goes to the end.
LEGS = ((1, 8, 2), (2, 2, 4), (4, 1, 6), (1, 1, None))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Legs end by a kill: every step is saved."""
    return (
        *one_level_arguments(tmp_path_factory),
        f"--config.train.steps={STEPS}",
        "--config.eval.every=100",
        "--config.checkpoint.every=1",
    )


@pytest.mark.slow
def test_1_2_4_processes_and_8_4_1_devices(arguments, tmp_path):
    """Steps of which no two legs have the same mesh; each is killed a while after its checkpoint."""
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "run"
    result = run("train", *arguments, f"--workdir={unbroken}")
    assert result.code == 0, result.err
    cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
    for number, (processes, devices, until) in enumerate(LEGS):
        launch = Launch(arguments, processes, devices, cache)
        leg = launch.start(workdir, tmp_path / f"{number}.log")
        if until is None:
            leg.finish()
        else:
            while leg.saved < until or not leg.step:
                assert leg.poll(), leg.printed
            leg.kill()
        print(f"{processes} processes of {devices} devices: from step {leg.resumed}, done {sorted(leg.step_seconds)}")
        if number:
            assert LEGS[number - 1][2] <= leg.resumed < STEPS

    expected, found = examples(unbroken), examples(workdir)
    assert found == expected
    batch_size = len(expected[1])
    assert [sorted(found[step]) for step in sorted(found)] == [
        list(range((step - 1) * batch_size, step * batch_size)) for step in range(1, STEPS + 1)
    ]
    assert len({path.name for path in (workdir / "examples").iterdir()}) == 4
    expected, found = losses(unbroken), losses(workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-5)
