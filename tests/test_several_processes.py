"""How a process ends that fails among several: with its own exit code, and not after JAX's five minutes."""

import os
import subprocess
import sys

import pytest
from killed_runs import xla_flags
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
        print("fails", flush=True)
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
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment | {"M2M_PROCESSES": f"{i}/2"}, **pipes) for i in range(2)]
    try:
        for i in codes:
            assert processes[i].stdout.readline() == "fails\n"
        errors = {i: processes[i].communicate(timeout=200)[1] for i in codes}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert {i: processes[i].returncode for i in codes} == codes, errors
    assert said in errors[1]


COLLECTIVES = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from m2m_jax.configuration import default_config
from m2m_jax.core import gathering, runtime
from m2m_jax.training import sharding

runtime.start()
config = default_config().mesh
config.data, config.fsdp, config.context = 2, 2, 2
mesh = sharding.make_mesh(config)
gathering.wait_for_all()
print("STARTED", flush=True)
multihost_utils.process_allgather(np.arange(3))
multihost_utils.broadcast_one_to_all(np.arange(3))
multihost_utils.sync_global_devices("all are here")
specs = [P(), P("data"), P("fsdp"), P(None, "fsdp"), P(("data", "fsdp")), P("context", "data"), P(("data", "context"))]
x = jnp.arange(64.0).reshape(8, 8)
for one, other in zip(specs, specs[3:] + specs[:3]):
    there = jax.jit(lambda x: x @ x.T, out_shardings=NamedSharding(mesh, other))
    there(jax.device_put(x, NamedSharding(mesh, one))).block_until_ready()
print("ENDED", flush=True)
"""


def test_devices_are_connected_before_a_program_computes(tmp_path):
    """Gloo gives the processes 30 s to come to a group's first collective, and one may compile for minutes longer than
    another. It prints a line when it has connected a group: at the start on standard error, and later none."""
    (tmp_path / "program.py").write_text(COLLECTIVES)
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": free_address(),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(4),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "program.py"],
            env=environment | {"M2M_PROCESSES": f"{i}/2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert "[Gloo]" in err  # the words that are looked for are still Gloo's
        assert out == "STARTED\nENDED\n"
