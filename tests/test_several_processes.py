"""How a process ends that fails among several: with its own exit code, and not after JAX's five minutes."""

import os
import subprocess
import sys
import time

import pytest
from run_fixtures import ROOT, free_address

PROGRAM = """
import sys
from absl import flags
from m2m_jax.core import runtime
from m2m_jax.core.errors import UserError
from m2m_jax.core.program import run_program

FAILS = flags.DEFINE_list("fails", None, "")
ERROR = flags.DEFINE_string("error", None, "")

def main(argv):
    runtime.start()
    import jax
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("started")
    if str(jax.process_index()) in FAILS.value:
        raise {"user": UserError, "other": KeyError}[ERROR.value](f"of {jax.process_index()}")
    multihost_utils.sync_global_devices("never reached by all")

run_program(main)
"""


@pytest.mark.parametrize(
    ("fails", "error", "codes", "said"),
    [
        ("1", "user", {1: 2}, "error: of 1"),
        ("1", "other", {1: 1}, "KeyError: 'of 1'"),
        ("0,1", "user", {0: 2, 1: 2}, ""),
    ],
)
def test_a_process_that_fails_ends_with_its_own_code(fails, error, codes, said, tmp_path):
    address = free_address()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", f"--fails={fails}", f"--error={error}"]
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen(command, env=environment | {"M2M_PROCESSES": f"{i}/2"}, **pipes) for i in range(2)]
    try:
        errors = {i: processes[i].communicate(timeout=200)[1] for i in codes}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert {i: processes[i].returncode for i in codes} == codes, errors
    assert said in errors[1]
    assert time.monotonic() - started < 200
