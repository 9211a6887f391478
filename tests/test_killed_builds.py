"""A build that is killed, as in tests/killed_builds.py, and one by processes with different numbers of devices."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from build_fixtures import arguments, differences, write_captions
from killed_builds import Builds, Moment, table, unfinished
from run_fixtures import ROOT
from text_fixtures import make_stable_diffusion

from m2m_jax.data import mis

MOMENTS = (Moment(0.5), Moment(0.5, shards=2), Moment(0.1, shards=1))
START_UP = 3.0  # seconds: less than any takes, compiled before or not


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Captions and a generator."""
    folder = tmp_path_factory.mktemp("inputs")
    return write_captions(folder / "captions.txt", 150), make_stable_diffusion(folder / "generator")


@pytest.fixture(scope="module")
def builds(inputs):
    cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
    return Builds(*inputs, cache)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, builds):
    """By one process on one device: where it is, and when its shards were there."""
    output = tmp_path_factory.mktemp("builds") / "unbroken"
    return output, builds.finish(output)


def test_killed_while_it_starts_and_writes_a_build_ends_byte_for_byte_as_if_it_were_not(builds, unbroken, tmp_path):
    expected, seen = unbroken
    kills = [builds.kill(tmp_path / "killed", moment, START_UP, (seen[-1] - seen[0]) / len(seen)) for moment in MOMENTS]
    print(table(kills))
    assert None not in kills
    assert kills[0].there == 0 < kills[1].there < kills[2].there < len(seen)
    builds.finish(tmp_path / "killed")
    assert not differences(expected, tmp_path / "killed") and not unfinished(tmp_path / "killed")
    manifest = mis.read_manifest(expected)
    assert manifest.sets == 150


def test_one_device_and_four_in_two_processes_at_once_make_the_same(builds, unbroken, tmp_path):
    builds.finish(tmp_path / "shared", devices=(1, 4))
    assert not differences(unbroken[0], tmp_path / "shared")


def test_processes_that_a_launch_joins_make_the_same(inputs, unbroken, tmp_path):
    launch = [ROOT / "launch" / "local.sh", f"--python={sys.executable}", "--module=m2m_jax.data.build_mis", "--"]
    command = [*launch, *arguments(*inputs, tmp_path / "joined")]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert not differences(unbroken[0], tmp_path / "joined")
