"""Programs are pages: they define flags, call one function and print; help comes at once; printing ends nothing."""

import ast
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from run_fixtures import ROOT, run
from test_layers import is_program, modules

from m2m_jax.config_fields import flatten
from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, fields, option, split_list
from m2m_jax.core.paths import expand_home, natural_order
from m2m_jax.sampling import job
from m2m_jax.sampling.options import ChosenSettings
from m2m_jax.sampling.settings import SamplingSettings
from m2m_jax.view.contact_sheet import Row, contact_sheet, context
from m2m_jax.view.html_page import html_page

TREES = modules()
PROGRAMS = sorted(name for name, tree in TREES.items() if is_program(tree))
MAY_DEFINE_FLAGS = {"m2m_jax.core.program", "m2m_jax.config_flag"}
MOST_LINES = 60


def _options() -> list[type]:
    """Every class of options that a program, or the library behind it, has."""
    for name, tree in TREES.items():
        if "Options" in ast.unparse(tree) and not is_program(tree):
            importlib.import_module(name)
    found, waiting = [], [Options]
    while waiting:
        subclasses = [one for one in waiting.pop().__subclasses__() if one.__module__.startswith("m2m_jax.")]
        found += subclasses
        waiting += subclasses
    return sorted(set(found), key=lambda one: one.__name__)


def test_there_are_options():
    assert {"TrainingRun", "Job", "SetBuild", "CaptionRules"} <= {one.__name__ for one in _options()}


# Thin


def test_there_are_programs():
    assert {"m2m_jax.train", "m2m_jax.sample", "m2m_jax.evaluate", "m2m_jax.data.precompute"} < set(PROGRAMS)


def test_no_library_defines_or_reads_flags():
    found = [
        name
        for name, tree in TREES.items()
        if name not in {*MAY_DEFINE_FLAGS, *PROGRAMS}
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and re.search(r"absl\.(flags|app)|absl import .*\b(flags|app)\b", ast.unparse(node))
    ]
    assert not found


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_its_flags_and_main(name):
    tree = TREES[name]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert defined == ["main"]
    assert any("run_program(main" in ast.unparse(node) for node in tree.body if isinstance(node, ast.If))
    code = [line for node in tree.body[1:] for line in ast.unparse(node).splitlines()]  # all but the docstring
    assert len(code) <= MOST_LINES


# Help

HELP = """
import contextlib, io, json, runpy, sys
from absl import flags
found = {}
for name in sys.argv[1:]:
    out, sys.argv = io.StringIO(), [name, "--help"]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(name, run_name="__main__")
    except SystemExit as end:
        own = [flag.name for flag in flags.FLAGS.flags_by_module_dict()[name]]
        found[name] = {"code": end.code, "help": out.getvalue(), "flags": own}
    for flag in own:
        delattr(flags.FLAGS, flag)
    heavy = ("jax", "flax", "grain", "orbax", "tensorflow_datasets")
    found[name]["heavy"] = [one for one in heavy if one in sys.modules]
print(json.dumps(found))
"""


def _environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), **variables}


def test_help_lists_all_flags_and_does_not_wait_for_jax():
    """All programs in one process: that nothing heavy is imported stands for the time."""
    command = [sys.executable, "-c", HELP, *PROGRAMS]
    result = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=True)
    for name, found in json.loads(result.stdout).items():
        assert not found["code"] and not found["heavy"], (name, found)
        assert found["flags"]
        for flag in found["flags"]:
            assert f"--{flag}:" in found["help"] or f"--[no]{flag}:" in found["help"], (name, flag)


BINARY = """
import sys
from m2m_jax.sampling.bundle_program import main
sys.argv = ["m2m-sample", "--help"]
try:
    main()
finally:
    assert "jax" not in sys.modules
"""


def test_help_of_the_sampler_binary_does_not_wait_for_jax():
    command = [sys.executable, "-c", BINARY]
    result = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=True)
    for field, _ in fields(job.Job):
        assert f"--{field.name}" in result.stdout
    assert not result.stderr


@pytest.mark.parametrize("flag", ["--help", "--helpshort", "--helpfull"])
def test_help_ends_with_0(flag):
    result = run("data.export", flag)
    assert result.code == 0 and "--num_sets" in result.out and not result.err


# Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Options):
    output: pathlib.Path = option("A path.")
    maybe: pathlib.Path | None = option("Another.", None)
    names: tuple[str, ...] = option("Several.", ())
    ends: tuple[float, ...] | None = option("Two numbers.", None)
    share: float = option("A share.", 0.5, low=0, high=1)
    kind: str = option("A word.", "a", choices=("a", "b"))


def test_options_are_converted():
    example = Example(output="~/x", maybe="", names=["a", "b"], ends=("0.2", "1"), share=1)
    assert example.output == pathlib.Path.home() / "x" and example.maybe is None
    assert example.names == ("a", "b") and example.ends == (0.2, 1.0) and type(example.share) is float


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"share": 2}, "--share is 2.0; it must be between 0 and 1"),
        ({"share": float("nan")}, "--share is nan; numbers are at most"),
        ({"kind": "c"}, "--kind is 'c'; it must be one of a, b"),
        ({"ends": ("x",)}, "--ends=x: could not convert"),
        ({"output": ""}, "--output is empty"),
        ({"kind": None}, "--kind is None; it takes a value of type str"),
        ({"names": [1]}, "--names is 1; it takes a value of type str"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        Example(**{"output": "x"} | wrong)


def test_settings_of_sampling_are_options_of_which_none_need_be_given():
    assert ChosenSettings().explicit() == {}
    given = ChosenSettings(steps=3, slide=False, guidance_interval=["0.2", 1]).explicit()
    assert given == {"steps": 3, "slide": False, "guidance_interval": (0.2, 1.0)}
    assert SamplingSettings(**given).guidance_interval == (0.2, 1.0)
    with pytest.raises(UserError, match=r"--guidance_scale is -1\.0; it must be at least 0"):
        ChosenSettings(guidance_scale=-1)


@pytest.mark.parametrize("kind", _options(), ids=lambda kind: kind.__name__)
def test_every_option_that_is_a_path_expands_a_home_folder(kind):
    needed = {"topology": "h100:8"}
    for field, what in fields(kind):
        if field.default is dataclasses.MISSING and field.name not in needed:
            needed[field.name] = ("x",) if what.several else 1 if what.type is int else "x"
    names = {field.name for field, _ in fields(kind)}
    needed = {name: value for name, value in needed.items() if name in names}
    for field, what in fields(kind):
        assert field.metadata["about"].help.endswith("."), field.name
        if what.type is pathlib.Path:
            given = "v5p:2x2x2" if field.name == "hlo" else needed.get("topology")
            more = {"topology": given} if given else {}
            value = getattr(kind(**needed | more | {field.name: ("~/y",) if what.several else "~/y"}), field.name)
            assert value == ((pathlib.Path.home() / "y",) if what.several else pathlib.Path.home() / "y")


def test_every_path_of_a_config_expands_a_home_folder():
    config = default_config()
    names = [name for name in flatten(config) if name.endswith(("path", "directory"))]
    assert len(names) >= 6
    config.update(dict.fromkeys(names, "~/x"))
    assert {flatten(config)[name] for name in names} == {str(pathlib.Path.home() / "x")}
    config.update(dict.fromkeys(names, ""))
    assert {flatten(config)[name] for name in names} == {""}


def test_the_data_set_beside_the_flags_expands_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run("data.check", "~/none")
    assert result.code == 2 and "~/none: no such folder" in result.err
    (tmp_path / "there").mkdir()
    assert "there" in run("data.check", "~/there").err


def test_without_a_home_folder_one_line_says_so(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match="~/x: there is no home folder for ~ to stand for"):
        expand_home("~/x")
    assert expand_home("x/~") == pathlib.Path("x/~")


def test_lists_are_parted_by_commas_outside_of_quotes():
    assert split_list('"a, b.png",c.png') == ["a, b.png", "c.png"]
    with pytest.raises(ValueError, match="a"):
        split_list('"a')


def test_people_count_2_before_10():
    names = ["10.png", "1.png", "2.png", "a.png", "01.png", "img9b.png", "img10a.png"]
    ordered = ["01.png", "1.png", "2.png", "10.png", "a.png", "img9b.png", "img10a.png"]
    assert [path.name for path in sorted(map(pathlib.Path, names), key=natural_order)] == ordered
    paths = [pathlib.Path(name) for name in ("s10/1.png", "s2/3.png", "s2", "s2/x", "/s1/2")]
    assert [str(path) for path in sorted(paths, key=natural_order)] == ["/s1/2", "s2", "s2/3.png", "s2/x", "s10/1.png"]


# Printing

PROGRAM = """
import sys
from pathlib import Path
from m2m_jax.core.program import run_program

def main(argv):
    for number in range(20_000):
        print("line", number, b"caf\\xe9.png".decode(errors="surrogateescape"), "\\u00e9\\ud800")
        sys.stdout.isatty()
    print("also here", file=sys.stderr)
    Path(argv[1]).write_text("done")
    return int(argv[2])

run_program(main, arguments=2)
"""


def _print(tmp_path, redirection: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f'{sys.executable} program.py done {code} {redirection}; exit "${{PIPESTATUS[0]}}"'
    environment = _environment(**variables)
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (tmp_path / "done").read_text() == "done"
    return result


@pytest.mark.parametrize("code", [0, 75])
def test_a_reader_that_goes_away_stops_nothing(tmp_path, code):
    result = _print(tmp_path, "| head -1", code)
    assert (result.returncode, result.stderr) == (code, b"also here\n")
    assert result.stdout.startswith(b"line 0 ") and result.stdout.count(b"\n") == 1
    result = _print(tmp_path, "2>&1 | head -1", code)
    assert (result.returncode, result.stderr) == (code, b"")


@pytest.mark.parametrize("code", [0, 75])
def test_a_full_disk_under_stdout_is_named_and_stops_nothing(tmp_path, code):
    result = _print(tmp_path, "> /dev/full", code)
    assert result.returncode == (code or 2)
    assert b"warning: standard output cannot be written: No space left on device" in result.stderr
    assert b"Traceback" not in result.stderr and b"Exception ignored" not in result.stderr
    assert (b"error: standard output could not be written" in result.stderr) == (code == 0)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", "2> /dev/full"])
def test_closed_streams_stop_nothing(tmp_path, redirection):
    result = _print(tmp_path, redirection)
    assert result.returncode == 0 and b"Traceback" not in result.stderr


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1:strict"])
def test_what_an_encoding_lacks_is_printed_as_bytes_or_escapes(tmp_path, encoding):
    result = _print(tmp_path, "", PYTHONIOENCODING=encoding)
    accent = {"utf-8": b"\xc3\xa9", "ascii": b"\\xe9", "latin-1": b"\xe9"}[encoding.partition(":")[0]]
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == b"line 0 caf\xe9.png " + accent + b"\\ud800"


def test_a_name_that_is_no_text_can_be_on_a_sheet_and_a_page(tmp_path):
    import numpy as np

    name = os.fsdecode(b"caf\xe9")
    rows = [Row(name, [context([np.zeros((8, 8, 3), np.uint8)])])]
    assert contact_sheet(rows).width
    page = html_page(rows, {name: {"context": [name]}})
    assert "caf\N{REPLACEMENT CHARACTER}" in page.encode("utf-8").decode("utf-8")


def test_a_data_set_with_names_that_are_no_text_is_checked(tmp_path):
    from PIL import Image

    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "m2m_jax.data.check", tmp_path, f"--output={tmp_path / 'sheet.png'}"]
    environment = _environment(PYTHONIOENCODING="utf-8:strict")
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 1, result.stderr
    assert b"caf\xe9/2.png: not an image that can be read" in result.stdout


# Environment


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: JAX finds no such device"),
        ({"JAX_PLATFORMS": "nonsense"}, "JAX_PLATFORMS=nonsense: JAX finds no such device"),
        ({"JAX_ENABLE_X64": "maybe"}, "JAX cannot start with this environment: invalid truth value 'maybe'"),
    ],
)
def test_an_environment_that_jax_cannot_start_in_is_said_in_a_line(tmp_path, variables, words):
    command = [sys.executable, "-m", "m2m_jax.sample", "--checkpoint=none", "--output=out"]
    environment = _environment(**variables)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result
    assert words in result.stderr


def test_a_path_that_cannot_be_looked_at_is_said_in_a_line():
    name = "x" * 300
    result = run("data.check", name)
    assert (result.code, result.err) == (2, f"error: {name}: File name too long\n")


NO_HOME = """
import pathlib

def no_home(*arguments):
    raise RuntimeError("Could not determine home directory.")

pathlib.Path.home = no_home
from m2m_jax.core import runtime
runtime.start()
import jax
print(jax.config.jax_compilation_cache_dir)
"""


def test_without_a_home_folder_nothing_is_kept_and_all_else_goes_on(tmp_path):
    environment = _environment(HOME="/nowhere")
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-c", NO_HOME]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout == "None\n", result.stderr
    assert "warning: there is no home folder to keep compiled programs in" in result.stderr
