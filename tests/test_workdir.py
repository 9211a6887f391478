"""A workdir: where it may lie, who owns it, and that what is saved there is there."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorstore
from checkpoint_fixtures import assert_bit_equal, create, save, steps_in
from run_fixtures import ROOT, config_argument, run

from m2m_jax.building import build_folder
from m2m_jax.checkpoints import checkpointer, stored_arrays, workdir_lock
from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.data import precomputed
from m2m_jax.data.preparing import prepare

# Where it may lie

# Beside every other character of ASCII, and some that are not.
REFUSED = ("a*b", "a?b", "[ab]", "run [v2]", "a[1]", "a\\b", "gs:", "gs:/x", "http:/x", "C:", "caf\udce9")
ALLOWED = (
    "a b",
    " a ",
    "~",
    "-x",
    ".a",
    "a:b",
    "{a,b}",
    "$HOME",
    "%20",
    "a#b",
    "a'b",
    'a"b',
    "a\nb",
    "é",
    "a@3",
    "a&b",
)


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_libraries_misread_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"--workdir=.*name another") as error:
        Checkpointer(tmp_path / name, keep=1)
    str(error.value).encode()  # can be printed
    assert not any(tmp_path.iterdir())


def test_of_a_relative_path_the_whole_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "[a]").mkdir()
    monkeypatch.chdir(tmp_path / "[a]")
    with pytest.raises(UserError, match=r"--workdir=run: .*has '\['"):
        disk.require_plain(pathlib.Path("run"), "--workdir")


@pytest.mark.parametrize("name", ALLOWED)
def test_any_other_name_will_do(tmp_path, name):
    disk.require_plain(tmp_path / name, "--workdir")


def test_what_is_saved_under_them_is_found_again(tmp_path):
    workdir = tmp_path.joinpath(*ALLOWED)
    with Checkpointer(workdir, keep=1) as checkpoints:
        save(checkpoints, 1, create())
    assert_bit_equal(load_for_sampling(workdir).ema_params, create().ema_params)


# What is saved is there


def test_a_save_of_which_a_library_lost_a_part_is_no_checkpoint(tmp_path, monkeypatch):
    """Orbax commits what it wrote under a pattern, and skips the merge, with a warning at most."""
    monkeypatch.setattr(disk, "require_plain", lambda *_: None)
    checkpoints = Checkpointer(tmp_path / "run [v2]", keep=1)
    save(checkpoints, 1, create())
    with pytest.raises(UserError, match=r"checkpoints/1 was not written whole: of item \w+ (array|nothing)"):
        checkpoints.wait()
    assert steps_in(tmp_path / "run [v2]") == []


ARRAYS = {"a": np.zeros((4, 6), np.float32), "b.c": np.ones((), np.int32), "d": np.zeros((5,), jax.numpy.bfloat16)}
LOST = {
    "": "",
    "a/.zarray": "array a is missing",
    "a/0.1": "1 of 4 parts of array a are missing",
    "b.c/0": "1 of 1 parts of array b.c are missing",
    "d/1": "1 of 3 parts of array d are missing",
}


@pytest.mark.parametrize("key", LOST)
def test_every_part_of_every_array_is_looked_for(tmp_path, key):
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
    for name, array in ARRAYS.items():
        chunks = [-(-size // 2) if array.ndim > 1 else 2 for size in array.shape]
        spec = {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}, "store_data_equal_to_fill_value": True}
        spec["metadata"] = {"chunks": chunks}
        opened = tensorstore.open(spec, create=True, shape=array.shape, dtype=array.dtype.name).result()
        opened.write(array).result()
    if key:
        tensorstore.KvStore.open(store).result().delete_range(tensorstore.KvStore.KeyRange(key, key + "\0")).result()
    assert stored_arrays.lost(tmp_path, ARRAYS) == LOST[key]
    if not key:
        other = ARRAYS | {"a": np.zeros((4, 7), np.float32), "d": np.zeros((5,), np.float32)}
        assert stored_arrays.lost(tmp_path, other) == (
            "array a is <f4[4, 6], not float32[4, 7], array d is bfloat16[5], not float32[5]"
        )


def test_nothing_there_is_everything_lost(tmp_path):
    assert stored_arrays.lost(tmp_path, {"a": np.zeros(3)}) == "array a is missing"


# Who owns it

OWNER = """
import pathlib, sys, time
from m2m_jax.checkpoints import workdir_lock
with workdir_lock.hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that owns `tmp_path`."""
    command = [sys.executable, "-c", OWNER, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_refused_and_writes_nothing(owner, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=rf"is in use: process {owner.pid} of .*kill {owner.pid}.*another --workdir"):
        Checkpointer(tmp_path, keep=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(owner, tmp_path, reaped):
    owner.send_signal(signal.SIGKILL)
    if reaped:
        owner.wait()
    else:  # a zombie still has its number
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    with workdir_lock.hold(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({"began": "1"}, True),  # the number is another process's now
        ({"boot": "another"}, True),  # the machine was started again
        ({"host": "another"}, False),
        ({"host": "another", "boot": "another"}, False),
        ({"container": "another"}, False),
        ({"host": "another", "launch": "slurm-7"}, True),  # the job was requeued on another node
        ({"container": "another", "launch": "slurm-7"}, True),
        ({"host": "another", "launch": "slurm-8"}, False),
        ({"launch": "slurm-7"}, False),  # which this machine sees to be alive
    ],
)
def test_whose_lock_is_taken_over(owner, tmp_path, monkeypatch, changed, taken):
    monkeypatch.setenv("M2M_LAUNCH", "slurm-7")
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | changed))
    if taken:
        with workdir_lock.hold(tmp_path):
            pass
    else:
        remedy = "remove .*lock" if {"host", "container"} & {*changed} else "kill "
        with (
            pytest.raises(UserError, match=f"is in use: process {owner.pid} of .*{remedy}"),
            workdir_lock.hold(tmp_path),
        ):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": "a"}'])
def test_a_lock_that_says_nothing_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with workdir_lock.hold(tmp_path):
        assert workdir_lock.Owner(**json.loads((tmp_path / "lock").read_text())).pid == os.getpid()


def test_file_systems_without_locks(owner, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir_lock.fcntl, "flock", flock)
    with pytest.raises(UserError, match="is in use"), workdir_lock.hold(tmp_path):
        pass


def test_one_of_many_that_start_at_once_gets_it(tmp_path):
    command = [sys.executable, "-c", OWNER, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(4)]
    try:
        (owner,) = [process for process in processes if process.stdout.readline() == "held\n"]
        assert json.loads((tmp_path / "lock").read_text())["pid"] == owner.pid
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_what_is_over_leaves_no_lock(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=1):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
    # Nor does what fails, when it is made and when it is closed.
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpointer.save_errors, "say_once", lambda: (_ for _ in ()).throw(RuntimeError))
        Checkpointer(tmp_path, keep=1)
    assert not (tmp_path / "lock").exists()
    checkpoints = Checkpointer(tmp_path, keep=1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoints, "wait", lambda: (_ for _ in ()).throw(RuntimeError))
        checkpoints.close()
    assert not (tmp_path / "lock").exists()


def test_an_owner_is_what_its_lock_says(tmp_path):
    with workdir_lock.hold(tmp_path):
        said = json.loads((tmp_path / "lock").read_text())
    own = dataclasses.asdict(workdir_lock.Owner.this_process())
    assert said | {"since": ""} == own | {"since": ""} and all(own[name] for name in own if name != "launch")


def test_programs_refuse_such_names_before_they_write(tmp_path):
    """Of what they write TFDS, Grain or Orbax look for files."""
    bad = tmp_path / "run [v2]"
    result = run("train", config_argument("emoji:tiny"), f"--workdir={bad}")
    assert result.code == 2 and "'[' in it; name another folder" in result.err and result.err.count("\n") == 1
    for write in (
        lambda: prepare("emoji", 32, str(bad)),
        lambda: build_folder.start(bad, None),
        lambda: precomputed.write_manifest(bad, "train", None),
    ):
        with pytest.raises(UserError, match=r"'\[' in it; name another folder"):
            write()
    assert not any(tmp_path.iterdir())
