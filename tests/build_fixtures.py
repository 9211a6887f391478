"""Small builds of image sets with a generator of random weights, and what two builds have in common."""

import json
import pathlib

from run_fixtures import Result, run

from m2m_jax.data import mis

IMAGES_PER_SET = 3
SETTINGS = (
    f"--images_per_set={IMAGES_PER_SET}",
    "--images_at_once=1",
    "--sets_at_once=2",
    "--sets_per_shard=3",
    "--steps=2",
    "--stepper=ddim",
    "--guidance_scale=3.0",
    "--validation_share=0.2",
    "--test_share=0.1",
    "--store=both",
)


def write_captions(path: pathlib.Path, number: int) -> pathlib.Path:
    """So many captions, up to 17,576, all different."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [f"red {letters[i % 26]} cat {letters[i // 26 % 26]}, {letters[i // 676]}" for i in range(number)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def build(captions: pathlib.Path, generator: pathlib.Path, output: pathlib.Path, *more: object) -> Result:
    """The program, inside this process."""
    return run("data.build_mis", *arguments(captions, generator, output), *more)


def arguments(captions: pathlib.Path, generator: pathlib.Path, output: pathlib.Path) -> list[str]:
    return [f"--captions={captions}", f"--generator={generator}", f"--output={output}", *SETTINGS]


def differences(expected: pathlib.Path, found: pathlib.Path) -> list[str]:
    """Files of the build `found` that are not, byte for byte, those of `expected`. The command alone may differ."""
    ours, theirs = _files(expected), _files(found)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _files(output: pathlib.Path) -> dict[str, object]:
    folder = mis.folder(output)
    files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    name = str((folder / mis.BUILD).relative_to(output))
    files[name] = {key: value for key, value in json.loads(files[name]).items() if key != "command"}
    return files
