"""Checkpoints that a disk, a crash or a person damaged: each is named, none is used, and the older ones are whole."""

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from checkpoint_fixtures import assert_bit_equal, create, save, save_three, steps_in, target
from killed_runs import xla_flags
from run_fixtures import ROOT, free_address, run, train_tiny

from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.core.errors import UserError
from m2m_jax.training.metrics import MetricWriter

# Dies with no chance to say goodbye while checkpoint 2 is being written.
KILLED = """
import os, pathlib, signal, sys
import conftest
from checkpoint_fixtures import create, save
from m2m_jax.checkpoints.checkpointer import Checkpointer
checkpoints = Checkpointer(sys.argv[1], keep=2)
save(checkpoints, 1, create())
save(checkpoints, 2, create())
os.kill(os.getpid(), signal.SIGKILL)
"""

# One of two processes that restore the same checkpoint.
RESTORES = """
import sys
import jax
import conftest
from m2m_jax.core import runtime
from m2m_jax.core.errors import UserError, refuse
from m2m_jax.checkpoints.checkpointer import Checkpointer
runtime.start()
from checkpoint_fixtures import create, target
checkpoints = Checkpointer(sys.argv[1], keep=2, fallback=sys.argv[2] == "True")
try:
    state = checkpoints.restore_train_state(target(create()))
except UserError as error:
    refuse(error)
print("restored", checkpoints.latest_step())
checkpoints.save(9, state, frozen={}, metadata={})
checkpoints.close()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 2 and 3, not to be changed, and the states."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, save_three(workdir)


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved[0], tmp_path / "run")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train_tiny(tmp_path_factory)


def _restore(workdir: pathlib.Path, step: int | None = None, **options):
    with Checkpointer(workdir, keep=2, **options) as checkpoints:
        return checkpoints.restore_train_state(target(create()), step)


def _flip(path: pathlib.Path, at: float = 0.5) -> None:
    """One bit, at this fraction of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def _replace_by_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "a flipped bit": _flip,
    "the first bit flipped": lambda path: _flip(path, 0.0),
    "the last bit flipped": lambda path: _flip(path, 1.0),
    "truncated": _truncate,
    "empty": _empty,
    "missing": pathlib.Path.unlink,
    "a folder in its place": _replace_by_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_every_item(workdir, saved, damage):
    """None is silent: the error names checkpoint, item and file; the older checkpoint is as good as it was."""
    folder = workdir / "checkpoints" / "3"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent != folder]
    items = {path.relative_to(folder).parts[0] for path in files}
    assert items == {"train_state", "ema", "autoencoder", "about"} and len(files) > 20
    # What resumes reads neither the autoencoder nor the other frozen models; what samples does not read the state.
    with Checkpointer(workdir, keep=2) as checkpoints:
        wanted = target(create())
        for path in files:
            content = path.read_bytes()
            if not content and DAMAGES[damage] not in (pathlib.Path.unlink, _replace_by_folder):
                continue
            DAMAGES[damage](path)
            item, *rest = path.relative_to(folder).parts
            named = rf"checkpoints/3 is damaged: item {item}: file {'/'.join(rest)} is (missing|not what was saved)"
            if item != "autoencoder":
                with pytest.raises(UserError, match=f"{named}.*checkpoint.fallback=True"):
                    checkpoints.restore_train_state(wanted)
            if item != "train_state":
                with pytest.raises(UserError, match=f"{named}.*another is .*checkpoints/2"):
                    load_for_sampling(workdir)
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)
        assert_bit_equal(checkpoints.restore_train_state(wanted, 2), saved[1][2])
        assert_bit_equal(checkpoints.restore_train_state(wanted), saved[1][3])
    assert load_for_sampling(workdir / "checkpoints" / "2").step == 2


@pytest.mark.parametrize("item", ["train_state", "ema", "autoencoder", "about"])
def test_files_and_items_that_do_not_belong_there(workdir, item):
    folder = workdir / "checkpoints" / "3"
    read = _restore if item == "train_state" else load_for_sampling
    extra = folder / item / "d" / "extra"
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("from elsewhere")
    with pytest.raises(UserError, match=rf"checkpoints/3 is damaged: item {item}: file d/extra is extra"):
        read(workdir)
    extra.unlink()
    os.mkfifo(extra)  # who opens it waits for ever
    with pytest.raises(UserError, match=rf"item {item}: file d/extra is extra"):
        read(workdir)
    shutil.rmtree(folder / item)
    with pytest.raises(UserError, match=rf"checkpoints/3 is damaged: item {item} is missing"):
        read(workdir)
    # All of another checkpoint's item: whole in itself, and not this one's.
    shutil.copytree(workdir / "checkpoints" / "2" / item, folder / item)
    if item in ("train_state", "ema"):
        with pytest.raises(UserError, match=rf"checkpoints/3 is damaged: item {item}: file .* more"):
            read(workdir)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checksums_themselves(workdir, damage):
    DAMAGES[damage](workdir / "checkpoints" / "3" / "SHA256SUMS")
    for read in (_restore, load_for_sampling):
        with pytest.raises(UserError, match=r"checkpoints/3 is damaged: .*SHA256SUMS|checkpoints/3 is damaged: item "):
            read(workdir)


def test_every_bit_of_the_checksums(workdir):
    """What is not found by reading one item is found by reading another."""
    sums = workdir / "checkpoints" / "3" / "SHA256SUMS"
    content = sums.read_bytes()
    with Checkpointer(workdir, keep=2) as checkpoints:
        for at in range(0, len(content), 97):
            sums.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            refused = 0
            for read in (lambda: checkpoints.restore_train_state(target(create())), lambda: load_for_sampling(workdir)):
                try:
                    read()
                except UserError:
                    refused += 1
            assert refused, content[at - 20 : at + 20]


def test_orbaxs_own_notes_are_not_read(workdir, saved):
    """Beside the items lie two files that Orbax completes after the checksums."""
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        for step in ("2", "3"):
            (workdir / "checkpoints" / step / name).write_bytes(b"\xff{")
    assert_bit_equal(_restore(workdir), saved[1][3])
    assert_bit_equal(load_for_sampling(workdir).ema_params, saved[1][3].ema_params)


def test_falling_back(workdir, saved, capsys):
    damaged = workdir / "checkpoints" / "3" / "ema" / "manifest.ocdbt"
    _flip(damaged)
    with pytest.raises(UserError, match=r"manifest\.ocdbt.*--config\.checkpoint\.fallback=True"):
        _restore(workdir)
    assert steps_in(workdir) == ["2", "3"] and capsys.readouterr().out == ""

    with Checkpointer(workdir, keep=2, fallback=True) as checkpoints:
        assert_bit_equal(checkpoints.restore_train_state(target(create())), saved[1][2])
        (line,) = capsys.readouterr().out.splitlines()
        assert "3 is damaged: item ema: file manifest.ocdbt" in line
        assert line.endswith("it is 3.damaged now, and step 2 is used instead")
        assert checkpoints.latest_step() == 2
        save(checkpoints, 3, create())
    assert steps_in(workdir) == ["2", "3", "3.damaged"]

    # Once more, and what lies there is not overwritten.
    _flip(damaged)
    assert_bit_equal(_restore(workdir, fallback=True), saved[1][2])
    assert steps_in(workdir) == ["2", "3.damaged", "3.damaged1"]
    assert load_for_sampling(workdir).step == 2


def test_falling_back_past_several(workdir, saved):
    with Checkpointer(workdir, keep=9) as checkpoints:
        save(checkpoints, 5, create())
    shutil.rmtree(workdir / "checkpoints" / "3" / "train_state")
    (workdir / "checkpoints" / "5" / "SHA256SUMS").unlink()
    assert_bit_equal(_restore(workdir, fallback=True), saved[1][2])
    assert steps_in(workdir) == ["2", "3.damaged", "5.damaged"]


def test_nothing_to_fall_back_to(workdir):
    """Nothing is renamed: the next start would find an empty folder and begin a new run."""
    for step in ("2", "3"):
        _flip(workdir / "checkpoints" / step / "train_state" / "manifest.ocdbt")
    with pytest.raises(UserError, match=r"checkpoints/3 is damaged.*no other is whole"):
        _restore(workdir, fallback=True)
    assert steps_in(workdir) == ["2", "3"]


def test_a_step_that_was_asked_for_is_not_replaced(workdir):
    _flip(workdir / "checkpoints" / "3" / "ema" / "manifest.ocdbt")
    with pytest.raises(UserError, match="checkpoints/3 is damaged"):
        _restore(workdir, step=3, fallback=True)
    assert steps_in(workdir) == ["2", "3"]


def test_killed_while_writing(tmp_path, capsys):
    command = [sys.executable, "-c", KILLED, tmp_path]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_in(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]
    assert load_for_sampling(tmp_path).step == 1
    assert_bit_equal(_restore(tmp_path), create())
    assert "2.orbax-checkpoint-tmp was not saved to its end; it is removed" in capsys.readouterr().out
    assert steps_in(tmp_path) == ["1"]


# Disks that cannot be written


@contextlib.contextmanager
def _no_large_files(monkeypatch):
    """As good as full: no file may grow beyond a few kilobytes."""
    # Python does not notice that it wrote half of a module's bytecode, and fails to import it the next time.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _mount(*arguments: object) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode
    ):
        pytest.skip("only where this process may mount")


def _refused_save(workdir: pathlib.Path, reason: str) -> None:
    """Saving step 4 is an error when it is waited for; the others are whole, and nothing is taken for a checkpoint."""
    checkpoints = Checkpointer(workdir, keep=2)
    with pytest.raises(UserError, match=f"checkpoints/4 cannot be written: {reason}; what was saved before is whole"):
        save(checkpoints, 4, create())
        checkpoints.wait()
    assert {"2", "3"} <= set(steps_in(workdir)) and "4" not in steps_in(workdir)


def test_full_disk(workdir, saved, monkeypatch):
    with _no_large_files(monkeypatch):
        _refused_save(workdir, "File too large")
    assert_bit_equal(_restore(workdir, 2), saved[1][2])
    assert_bit_equal(_restore(workdir), saved[1][3])
    # The failure is noticed by the next save, too; and where there is room again, it goes on.
    checkpoints = Checkpointer(workdir, keep=2)
    with _no_large_files(monkeypatch), pytest.raises(UserError, match="checkpoints/4 cannot be written"):
        save(checkpoints, 4, create())
        save(checkpoints, 5, create())
    with Checkpointer(workdir, keep=2) as checkpoints:
        save(checkpoints, 4, create())
    assert steps_in(workdir) == ["3", "4"]
    assert_bit_equal(_restore(workdir), create())


def test_full_tmpfs(saved, tmp_path):
    """A real one: the checkpoints are 300 kB, and the disk 700."""
    disk = tmp_path / "disk"
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", "size=700k", "none", disk)
    try:
        workdir = shutil.copytree(saved[0], disk / "run")
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(bytes(free - 50_000))
        _refused_save(workdir, "No space left on device")
        assert_bit_equal(_restore(workdir), saved[1][3])
        with pytest.raises(UserError, match=r"run cannot be written: No space left on device"):
            (disk / "more").write_bytes(bytes(shutil.disk_usage(disk).free))
            writer = MetricWriter(workdir, total_steps=10)
            for step in range(1000):
                writer.scalars(step, {f"train/{i}": 0.5 for i in range(100)})
        (disk / "other").unlink()
        with Checkpointer(workdir, keep=2) as checkpoints:
            save(checkpoints, 4, create())
        assert steps_in(workdir) == ["3", "4"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_read_only_folder(workdir, saved):
    """By its permissions; for root, whom they do not stop, by a mount that is read-only."""
    root = os.geteuid() == 0
    if root:
        _mount("--bind", workdir, workdir)
    try:
        if root:
            _mount("-o", "remount,bind,ro", workdir)
        else:
            subprocess.run(["chmod", "555", workdir, workdir / "checkpoints"], check=True)
        reason = "Read-only file system" if root else "Permission denied"
        with pytest.raises(UserError, match=f"run cannot be written: {reason}"):
            Checkpointer(workdir, keep=2)
        assert load_for_sampling(workdir).step == 3
        with pytest.raises(UserError, match=f"run cannot be written: {reason}"):
            MetricWriter(workdir, total_steps=10)
    finally:
        subprocess.run(["umount", workdir] if root else ["chmod", "755", workdir, workdir / "checkpoints"], check=True)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"checkpoints cannot be written: File exists"):
        Checkpointer(tmp_path, keep=2)


# The programs


def test_training_with_a_damaged_checkpoint_and_another_config(tiny_run, tmp_path):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "run")
    arguments = ("train", *tiny_run.arguments, f"--workdir={workdir}")
    _flip(workdir / "checkpoints" / "6" / "train_state" / "manifest.ocdbt")
    result = run(*arguments)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "checkpoints/6 is damaged: item train_state: file manifest.ocdbt is not what was saved" in result.err
    assert "--config.checkpoint.fallback=True" in result.err

    # The tiny run ends at step 6; told to end at 3, it does so by reading what it falls back to.
    changes = ("--config.seed=1", "--config.train.steps=3", "--config.data.prefetch=1")
    result = run(*arguments, "--config.checkpoint.fallback=True", *changes)
    assert result.code == 0, result.err
    assert result.err == ""
    assert "it is 6.damaged now, and step 3 is used instead" in result.out
    assert "  config.seed: 0 -> 1\n  config.train.steps: 6 -> 3\n  seed decides on data and noise" in result.out
    assert "resumed at step 3" in result.out and "prefetch" not in result.out
    assert steps_in(workdir) == ["3", "6.damaged"]

    result = run(*arguments, "--config.model.block_out_channels=(32,)")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "is of another model or optimizer" in result.err
    assert "since then config.model.block_out_channels: " in result.err


def test_sampling_does_not_fall_back(tiny_run, tmp_path):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "run")
    _flip(workdir / "checkpoints" / "6" / "ema" / "manifest.ocdbt")
    for program in ("sample", "export", "to_diffusers"):
        result = run(program, f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}")
        assert result.code == 2 and result.err.count("\n") == 1 and not (tmp_path / "out").exists()
        assert "checkpoints/6 is damaged: item ema: file manifest.ocdbt is not what was saved" in result.err
        assert "another is " in result.err and "checkpoints/3: name it as the checkpoint" in result.err
    arguments = ("--num_images=1", "--steps=1", f"--output={tmp_path / 'out'}")
    assert run("sample", f"--checkpoint={workdir / 'checkpoints' / '3'}", *arguments).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("fallback", [False, True])
def test_two_processes_agree(workdir, saved, fallback):
    """One file is damaged, which one of them reads: both refuse, or both go back. None waits for the other."""
    folder = workdir / "checkpoints" / "3"
    for file in sorted((folder / "train_state").rglob("*"))[-1:]:
        _flip(file)
    environment = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "XLA_FLAGS": xla_flags(2),
        "JAX_COORDINATOR_ADDRESS": free_address(),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RESTORES, workdir, str(fallback)],
            env=os.environ | environment | {"M2M_PROCESSES": f"{i}/2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = [(*process.communicate(timeout=200), process.returncode) for process in processes]
    for out, err, code in results:
        assert code == (0 if fallback else 2), err
        if fallback:
            assert "restored 2" in out
        else:
            assert "checkpoints/3 is damaged: item train_state: file" in err
    assert steps_in(workdir) == (["2", "3.damaged", "9"] if fallback else ["2", "3"])
    if fallback:
        assert_bit_equal(_restore(workdir), saved[1][2])
