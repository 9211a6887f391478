"""The config, its limits, and what a mistyped command line says."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from m2m_jax.config_flag import check_arguments
from m2m_jax.config_rules import CHOICES, LIMITS, validate
from m2m_jax.configuration import default_config, from_json, to_json
from m2m_jax.errors import UserError
from m2m_jax.training.sharding import AXES

ROOT = Path(__file__).parents[1]
EMOJI = str(ROOT / "configs" / "emoji.py")

PROGRAM = """
from m2m_jax import config_flag, config_rules, program
CONFIG = config_flag.define_config_flag()
def main(argv):
    config_rules.validate(CONFIG.value)
    print(CONFIG.value.train.steps)
program.run_program(main, config_flag.check_arguments)
"""


def _run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_default_is_valid_and_locked():
    config = default_config()
    validate(config)
    with pytest.raises(AttributeError):
        config.train.stesp = 3


CONFIGS = {
    "emoji": {"", "demo", "road", "tiny"},
    "emoji_dino": {"", "demo", "road", "tiny"},
    "emoji_t2i": {"", "tiny"},
    "emoji_base": {"", "tiny"},
    "emoji_vae": {"", "tiny"},
    "folder": {"", "demo", "road", "tiny"},
    "sets_base": {"", "tiny"},
    "sets_vae": {"", "tiny"},
    "mis_sd21_self": {""},
    "mis_sd21_dino": {""},
}


def test_every_config_file_is_known_here():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("preset", ["", "demo", "tiny"])
def test_committed_configs_are_valid(name, preset):
    get_config = runpy.run_path(ROOT / "configs" / f"{name}.py")["get_config"]
    if preset in CONFIGS[name]:
        config = get_config(preset)
        config.data.path = "somewhere"  # no config can know where full-size data lies
        validate(config)
    else:
        with pytest.raises(UserError, match=preset):
            get_config(preset)


def test_every_number_has_limits():
    fields = dict(_leaves(to_json(default_config())))
    assert set(CHOICES) | set(LIMITS) <= set(fields)
    numbers = {name for name, value in fields.items() if type(value) in (int, float)}
    # These are held against each other, or may be -1.
    mesh = {f"mesh.{axis}" for axis in AXES}
    assert numbers - set(LIMITS) == {"schedule.beta_start", "schedule.beta_end"} | mesh


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("train.steps", 0, ["train.steps", "0", "at least 1"]),
        ("data.images_per_set", 26, ["images_per_set", "26", "between 1 and 25"]),
        ("data.images_per_set", 0, ["images_per_set", "between 1 and 25"]),
        ("model.attn2", "image_sets", ["model.attn2", "image_sets", "image_set, text, none"]),
        ("sample.stepper", "rk4", ["sample.stepper", "dpmpp_2m, ddim"]),
        ("data.image_size", 33, ["image_size", "33", "multiple of 2"]),
        ("data.name", "folder", ["data.path", "--config.data.path"]),
        ("data.kinds", ("styles",), ["data.kinds", "styles", "style, content"]),
        ("model.norm_num_groups", 48, ["norm_num_groups", "48", "(64, 128)"]),
        ("model.num_attention_heads", (2,), ["num_attention_heads", "block_out_channels"]),
        ("mesh.fsdp", 0, ["mesh.fsdp", "-1"]),
        ("checkpoint.keep", 0, ["checkpoint.keep", "at least 1"]),
    ],
)
def test_validate_names_the_field_and_the_remedy(field, value, words):
    config = default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        validate(config)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_json_round_trip():
    config = default_config()
    config.data.kinds = ("style",)
    restored = from_json(json.loads(json.dumps(to_json(config))))
    assert restored == config
    assert restored.data.kinds == ("style",)


def test_json_of_another_version_is_refused():
    values = to_json(default_config())
    values["train"]["epochs"] = 3
    with pytest.raises(UserError, match=r"train\.epochs"):
        from_json(values)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"--config={EMOJI}", "--config.train.stesp=3"], ["config.train.stesp", "did you mean config.train.steps?"]),
        ([f"--config={EMOJI}", "--config.trian.steps", "3"], ["did you mean config.train.steps?"]),
        ([f"--config={EMOJI}", "--config.epsilon_decay=3"], ["unknown config field config.epsilon_decay"]),
        ([f"--config={EMOJI}", "--noconfig.data.augment.enable"], ["config.data.augment.enabled?"]),
        ([f"--config={EMOJI}", "--config.train=3"], ["group of fields"]),
        ([f"--config={EMOJI}:dmeo"], ["dmeo", "did you mean demo?", ":tiny"]),
        (["--config", "configs/none.py"], ["configs/none.py"]),
        ([], ["--config="]),
    ],
)
def test_check_arguments_names_the_nearest(arguments, words):
    with pytest.raises(UserError) as error:
        check_arguments(["program", *arguments])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--config.train.stesp=3"], "config.train.steps"),
        (["--config.train.steps=many"], "config.train.steps"),
        (["--config.train.steps=-3"], "at least 1"),
        (["--wrkdir=x"], "wrkdir"),
        (["stray"], "stray"),
    ],
)
def test_program_refuses_in_one_line(arguments, word):
    result = _run(f"--config={EMOJI}:tiny", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert word in result.stderr


def test_program_takes_overrides():
    result = _run(f"--config={EMOJI}:tiny", "--config.train.steps=7")
    assert (result.returncode, result.stdout) == (0, "7\n"), result.stderr
