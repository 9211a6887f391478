"""What two runs left in their workdirs, compared: bit for bit, or the ids of the examples alone."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

# Of a line of metrics.jsonl: what no two runs have in common.
TIMINGS = {"images_per_second", "step_seconds", "data_wait_share"}


def metric_lines(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_timings(workdir: pathlib.Path) -> list[dict]:
    """The same, each with what another run must log, too."""
    timings = {f"train/{name}" for name in TIMINGS}
    return [{key: value for key, value in line.items() if key not in timings} for line in metric_lines(workdir)]


def losses(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    """{(step, name): value} of the training and evaluation losses; an error where one was logged twice."""
    found = {}
    for line in metric_lines(workdir):
        for name, value in line.items():
            if "loss" in name:
                assert (line["step"], name) not in found, f"{name} of step {line['step']} was logged twice"
                found[line["step"], name] = value
    return found


def examples(workdir: pathlib.Path) -> dict[int, dict[int, str]]:
    """{step: {example index: set id}} of all processes; an error where one step had an example twice."""
    found: dict[int, dict[int, str]] = {}
    for path in sorted((workdir / "examples").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            values = json.loads(line)
            of_step = found.setdefault(values["step"], {})
            for index, set_id in zip(values["examples"], values["sets"], strict=True):
                assert index not in of_step, f"example {index} is twice in step {values['step']}"
                of_step[index] = set_id
    return found


def saved_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """{item.name: array} of every array of a checkpoint, read to the host whatever devices it was saved from."""
    arrays = {}
    for folder in _items(workdir, step):
        if (folder / "_METADATA").exists():
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.metadata(folder).item_metadata.tree
                to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                item = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=to_numpy))
            arrays |= {f"{folder.name}.{name}": np.asarray(value) for name, value in item.items()}
    return arrays


def differences(expected: pathlib.Path, found: pathlib.Path, step: int) -> list[str]:
    """What of the run `found` is not, bit for bit, what it is in `expected`; both ended at `step`. A line each."""
    result = []
    ours, theirs = saved_arrays(expected, step), saved_arrays(found, step)
    result += [f"checkpoint {step}: {name} is in only one" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            result.append(f"checkpoint {step}: {name} differs")
    if _about(expected, step) != _about(found, step):
        result.append(f"checkpoint {step}: about differs")
    result += _compare_lines("metrics.jsonl", without_timings(expected), without_timings(found))
    if examples(expected) != examples(found):
        result.append("the examples differ")
    names = sorted({path.name for workdir in (expected, found) for path in (workdir / "samples").iterdir()})
    for name in names:
        grids = [workdir / "samples" / name for workdir in (expected, found)]
        if not all(grid.exists() for grid in grids) or len({grid.read_bytes() for grid in grids}) > 1:
            result.append(f"samples/{name} differs")
    return result


def summary(workdir: pathlib.Path, step: int) -> str:
    """How much `differences` compares."""
    arrays = saved_arrays(workdir, step)
    scalars = sum(value.size for value in arrays.values())
    grids = len(list((workdir / "samples").iterdir()))
    ids = sum(len(of_step) for of_step in examples(workdir).values())
    return (
        f"{len(arrays)} arrays ({scalars:,} numbers) of checkpoint {step}, {len(metric_lines(workdir))} lines of "
        f"metrics.jsonl, the ids of {ids} examples, {grids} sample grids"
    )


def _items(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
    return sorted(path for path in (workdir / "checkpoints" / str(step)).resolve().iterdir() if path.is_dir())


def _about(workdir: pathlib.Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "about" / "metadata").read_text())


def _compare_lines(name: str, expected: list[dict], found: list[dict]) -> list[str]:
    result = [f"{name} has {len(found)} lines, not {len(expected)}"] if len(expected) != len(found) else []
    for number, (a, b) in enumerate(zip(expected, found, strict=False), start=1):
        if a != b:
            fields = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
            return [*result, f"{name}, line {number} (step {a.get('step')}): {', '.join(fields)} differ"]
    return result
