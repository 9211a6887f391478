"""The config, its limits, its command line, and what a mistyped one says."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from run_fixtures import load_config, run

from m2m_jax import config_flag, configuration
from m2m_jax.config_fields import Group, UnknownField, field, fields_of, flatten, groups_in, options
from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, build, default_config, from_json, to_json
from m2m_jax.core.errors import UserError
from m2m_jax.core.program import read_flags
from m2m_jax.core.registry import Registry
from m2m_jax.data.pipeline import SOURCES, open_examples
from m2m_jax.diffusion.schedule import BETA_SCHEDULES, NoiseSchedule
from m2m_jax.diffusion.step_tables import STEPPERS
from m2m_jax.sampling.settings import SamplingSettings
from m2m_jax.tasks.registry import TASKS
from m2m_jax.training.sharding import AXES

ROOT = Path(__file__).parents[1]
EMOJI = str(ROOT / "configs" / "emoji.py")
FIELDS = {
    group.name_of(name): one
    for group in groups_in(default_config())
    for name, one in fields_of(type(group)).items()
    if not one.is_group
}


def read(*arguments: str) -> Config:
    """The config of a command line."""
    values = flags.FlagValues()
    holder = define_config_flag(values)
    read_flags(["program", *arguments], holder.take, values)
    return holder.value


def forget(registry: Registry, name: str) -> None:
    for table in (registry._registered, registry._by):
        table.pop(name, None)


def test_default_is_valid():
    validate(default_config())


CONFIGS = {
    "emoji": {"", "demo", "road", "tiny"},
    "emoji_dino": {"", "demo", "road", "tiny"},
    "emoji_t2i": {"", "tiny"},
    "emoji_base": {"", "tiny"},
    "emoji_vae": {"", "tiny"},
    "folder": {"", "demo", "road", "tiny"},
    "sets_base": {"", "tiny"},
    "sets_dino": {"", "tiny"},
    "sets_self": {"", "tiny"},
    "sets_vae": {"", "tiny"},
    "mis_sd21_self": {""},
    "mis_sd21_dino": {""},
}


def test_every_config_file_is_known_here():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("preset", ["", "demo", "tiny"])
def test_committed_configs_are_valid(name, preset):
    if preset in CONFIGS[name]:
        config = load_config(f"{name}:{preset}")
        config.data.path = "somewhere"  # no config can know where full-size data lies
        validate(config)
    else:
        with pytest.raises(UserError, match=preset):
            load_config(f"{name}:{preset}")


# Every field


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_help_limits_and_choices(name):
    one = FIELDS[name]
    assert one.about.help.endswith("."), "a sentence"
    for value in one.default if isinstance(one.default, tuple) else (one.default,):
        if type(value) in (int, float):
            assert one.about.low <= value <= one.about.high and one.about.low > float("-inf")
        if one.about.choices:
            assert value in one.about.words and all(isinstance(word, str) for word in one.about.words)


def test_mesh_has_every_axis():
    assert tuple(fields_of(configuration.Mesh)) == AXES


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("train.steps", 0, ["train.steps", "0", "at least 1"]),
        ("train.steps", 2**40, ["train.steps", "at most 4294967295"]),
        ("data.images_per_set", 26, ["images_per_set", "26", "between 1 and 25"]),
        ("data.images_per_set", 0, ["images_per_set", "between 1 and 25"]),
        (
            "model.attentions",
            ("self", "sets"),
            ["model.attentions", "sets", "must be one of self, text, set"],
        ),
        ("sample.stepper", "rk4", ["sample.stepper", "one of", "ddim"]),
        ("data.name", "folder", ["data.path", "--config.data.path"]),
        ("data.name", "folders", ["did you mean folder?", "precomputed"]),
        ("data.kinds", ("styles",), ["data.kinds", "styles", "style, content"]),
        ("data.kinds", (), ["data.kinds", "at least one"]),
        ("data.latents", True, ["data.latents", "data.name=emoji has no choice"]),
        ("schedule.beta_start", 0.5, ["beta_start", "0.5", "beta_start <= beta_end"]),
        ("diffusion.clean_timestep", 1000, ["clean_timestep", "less than", "num_train_timesteps"]),
        ("profile.steps", (3, 1), ["profile.steps", "(0, 0) for none"]),
        ("profile.steps", (0, 1), ["profile.steps", "(0, 0) for none"]),
        ("model.norm_num_groups", 48, ["config.model", "norm_num_groups", "48", "(64, 128)"]),
        ("model.num_attention_heads", (2,), ["config.model", "num_attention_heads"]),
        ("model.down_block_types", ("DownBlock",) * 2, ["down_block_types", "CrossAttnDownBlock2D, DownBlock2D"]),
        ("mesh.fsdp", 0, ["mesh.fsdp", "-1"]),
        ("checkpoint.keep", 0, ["checkpoint.keep", "at least 1"]),
        ("text_encoder.path", "bert", ["text_encoder.path", "text_to_image"]),
        ("model.attentions", ("self", "text"), ["model.attentions", "text_to_image"]),
        ("model.attentions", ("self",), ["model.attentions", "images_per_set=1"]),
        ("task", "text_to_image", ["model.attentions", "self,text"]),
    ],
)
def test_validate_names_the_field_and_the_remedy(field, value, words):
    config = default_config()
    config.update({field: value})
    with pytest.raises(UserError) as error:
        validate(config)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.image_size": 34}, ["data.image_size", "34", "multiple of 4"]),
        ({"data.name": "precomputed", "data.path": "x", "data.augment.enabled": False}, ["precomputed holds latents"]),
        ({"train.parameters": "attention"}, ["train.parameters"]),
        ({"autoencoder.norm_num_groups": 48}, ["config.autoencoder", "norm_num_groups"]),
    ],
)
def test_a_task_says_what_does_not_go_with_it(changes, words):
    config = load_config("emoji_vae")
    config.update(changes)
    with pytest.raises(UserError) as error:
        validate(config)
    for word in words:
        assert word in str(error.value)


def test_a_group_can_be_validated_alone():
    config = default_config()
    config.model.norm_num_groups = 48
    validate(config.data)
    config.data.image_size = 1
    with pytest.raises(UserError, match=r"config\.data\.image_size is 1"):
        validate(config.data)


# Setting fields


@pytest.mark.parametrize(
    ("group", "name", "value", "words"),
    [
        ("train", "stesp", 3, "unknown config field config.train.stesp; did you mean config.train.steps?"),
        ("", "optimiser", 3, "did you mean config.optimizer?"),
        ("train", "steps", "many", "config.train.steps is 'many'; it takes a whole number, as in 10000"),
        ("train", "steps", True, "config.train.steps is True"),
        ("train", "steps", 3.5, "config.train.steps is 3.5"),
        ("optimizer", "learning_rate", float("nan"), "config.optimizer.learning_rate is nan; it takes a finite number"),
        ("data", "kinds", "style", "config.data.kinds is 'style'; it takes a tuple of texts"),
        ("profile", "steps", (1, 2, 3), "config.profile.steps is (1, 2, 3); it takes a tuple of 2 whole numbers"),
        ("", "train", 3, "config.train is a group of fields"),
    ],
)
def test_a_field_refuses_what_it_cannot_hold(group, name, value, words):
    config = default_config()
    with pytest.raises(UserError, match=re.escape(words)):
        setattr(getattr(config, group) if group else config, name, value)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(UnknownField, match="did you mean"):
        default_config().train.stesp  # noqa: B018
    assert not hasattr(default_config().train, "stesp")


def test_fields_take_lists_and_whole_numbers():
    config = default_config()
    config.model.block_out_channels = [16, 32]
    config.optimizer.learning_rate = 1
    assert config.model.block_out_channels == (16, 32)
    assert type(config.optimizer.learning_rate) is float


def test_update_takes_dotted_names_groups_and_fields():
    config, expected = default_config(), default_config()
    expected.train.steps, expected.mesh.data, expected.mesh.fsdp = 3, 2, 4
    expected.data.options = {"url": "here", "shards": 3}
    config.update({"train.steps": 3, "mesh": {"data": 2}, "data.options": {"url": "here"}, "data.options.shards": 3})
    config.mesh.update(fsdp=4)
    assert config == expected
    with pytest.raises(UnknownField, match=r"config\.train\.steps\?"):
        config.update({"train.stesp": 3})
    with pytest.raises(UnknownField, match=r"unknown config field config\.train\.steps\.more"):
        config.update({"train.steps.more": 3})
    with pytest.raises(UserError, match=r"config\.train is a group of fields"):
        config.update({"train": 3})


def test_a_copy_is_another_config():
    config = default_config()
    other = copy.deepcopy(config)
    other.train.steps = 3
    assert config == default_config() != other


@dataclasses.dataclass
class Thing:
    steps: int = 1
    stepper: str = "ddim"
    own: float = 2.0


def test_build_takes_fields_of_the_same_name():
    assert build(Thing, default_config().sample, stepper="euler") == Thing(25, "euler", 2.0)


# JSON


def test_json_round_trip():
    config = default_config()
    config.data.kinds = ("style",)
    restored = from_json(json.loads(json.dumps(to_json(config))))
    assert restored == config
    assert restored.data.kinds == ("style",)


def test_json_of_an_older_version_takes_defaults():
    values = to_json(default_config())
    del values["model"]["precision"]
    assert from_json(values) == default_config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values["train"].update(epochs=3), r"another version.*train\.epochs"),
        (lambda values: values["train"].update(steps="3"), r"train\.steps is '3'"),
        (lambda values: values.update(train=3), r"train"),
        (lambda values: values["model"].update(block_out_channels=[1, [2]]), r"block_out_channels"),
    ],
)
def test_json_that_is_no_config_is_refused(change, words):
    values = to_json(default_config())
    change(values)
    with pytest.raises(UserError, match=words):
        from_json(values)


# The command line


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--config.train.steps=7"], "train.steps", 7),
        (["--config.train.steps", "7"], "train.steps", 7),
        (["-config.train.steps=0x10"], "train.steps", 16),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.optimizer.learning_rate=1e-3"], "optimizer.learning_rate", 1e-3),
        (["--config.data.latents"], "data.latents", True),
        (["--config.data.latents=true"], "data.latents", True),
        (["--noconfig.data.augment.enabled"], "data.augment.enabled", False),
        (["--config.data.augment.enabled=False"], "data.augment.enabled", False),
        (["--config.model.block_out_channels=(16,)"], "model.block_out_channels", (16,)),
        (["--config.model.block_out_channels=16, 32"], "model.block_out_channels", (16, 32)),
        (["--config.model.block_out_channels=[16,32]"], "model.block_out_channels", (16, 32)),
        (["--config.model.down_block_types=('DownBlock2D',)"], "model.down_block_types", ("DownBlock2D",)),
        (["--config.data.kinds=style"], "data.kinds", ("style",)),
        (["--config.data.kinds=()"], "data.kinds", ()),
        (["--config.init.path="], "init.path", ""),
        (["--config.data.path=a=b"], "data.path", "a=b"),
        (["--config.train.steps=1", "--config.train.steps=2"], "train.steps", 2),
    ],
)
def test_overrides(arguments, name, value):
    for line in ([f"--config={EMOJI}:tiny", *arguments], [*arguments, "--config", f"{EMOJI}:tiny"]):
        found = flatten(read(*line))[name]
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            [f"--config={EMOJI}", "--config.train.stesp=3"],
            ["unknown", "config.train.stesp; did you mean config.train.steps?"],
        ),
        ([f"--config={EMOJI}", "--config.trian.steps", "3"], ["did you mean config.train.steps?"]),
        ([f"--config={EMOJI}", "--config.steps=3"], ["did you mean config.train.steps?"]),
        ([f"--config={EMOJI}", "--config.epsilon_decay=3"], ["unknown config field config.epsilon_decay"]),
        ([f"--config={EMOJI}", "--noconfig.data.augment.enable"], ["config.data.augment.enabled?"]),
        ([f"--config={EMOJI}", "--noconfig.data.latents=True"], ["--noconfig.data.latents takes no value"]),
        ([f"--config={EMOJI}", "--config.train=3"], ["group of fields"]),
        ([f"--config={EMOJI}", "--config.data.options=3"], ["--config.data.options.NAME=VALUE"]),
        ([f"--config={EMOJI}", "--config.data.options.url=3"], ["data.options.url", "emoji has no such option"]),
        ([f"--config={EMOJI}", "--config.train.steps=many"], ["config.train.steps is 'many'", "a whole number"]),
        ([f"--config={EMOJI}", "--config.train.steps=1.0"], ["config.train.steps"]),
        ([f"--config={EMOJI}", "--config.data.latents=maybe"], ["config.data.latents", "True or False"]),
        ([f"--config={EMOJI}", "--config.model.block_out_channels=(16,x)"], ["block_out_channels", "whole numbers"]),
        ([f"--config={EMOJI}", "--config.train.steps"], ["--config.train.steps lacks a value"]),
        ([f"--config={EMOJI}:dmeo"], ["dmeo", "did you mean demo?", ":tiny"]),
        (["--config", "configs/none.py"], ["configs/none.py"]),
        (["--config"], ["there is no config file ''"]),
        ([f"--config={__file__}"], ["no config file", "get_config"]),
        ([f"--config={ROOT / 'README.md'}"], ["no config file", ".py"]),
        ([], ["--config="]),
        (["--config.train.steps=3"], ["no config; name one"]),
        ([f"--config={EMOJI}", "--wrkdir=x"], ["wrkdir"]),
    ],
)
def test_a_command_line_is_refused(arguments, words):
    with pytest.raises(UserError) as error:
        read(*arguments)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_a_config_needs_no_jax():
    """`--help` of a program answers at once."""
    program = f"""
import sys
from m2m_jax import config_flag, config_rules, configuration
holder = config_flag.define_config_flag()
holder.take(["program", "--config={EMOJI}:tiny", "--config.train.steps=7"])
assert holder.value.train.steps == 7
heavy = {{"jax", "flax", "grain", "numpy", "ml_collections"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_beside_a_config_lists_every_field():
    result = run("data.show", f"--config={EMOJI}:tiny", "--help")
    for name, one in FIELDS.items():
        if not one.about.options_of:
            assert f"--config.{name}:" in result.out
            assert one.about.help[:20] in result.out
    words = " ".join(result.out.split())
    assert "Training steps of the whole run. (a whole number, at least 1; here 6, default 10000)" in words
    assert f"One of {', '.join(STEPPERS)}." in words
    assert "folder: A folder of folders of images" in words
    assert result.out.count("--config.") == len(FIELDS) - 1 + 1  # and the help of --config itself, without options


# What others register


@dataclasses.dataclass
class MineOptions:
    url: str = field("nowhere", "Where it lies.")
    shards: int = field(1, "In so many files.", low=1)


@pytest.fixture
def own_source():
    """A data source that `data.name=mine` chooses: the emoji, under another name, with options of its own."""

    class Mine:
        """Sets of mine."""

        Options = MineOptions

        @classmethod
        def check_config(cls, data):
            if data.image_size != 32:
                raise UserError("mine is of 32 px")

    SOURCES.register("mine")(Mine)
    yield Mine
    forget(SOURCES, "mine")


def test_a_source_brings_options_and_rules(own_source):
    arguments = [f"--config={EMOJI}:tiny", "--config.data.options.shards=3", "--config.data.name=mine"]
    config = read(*arguments)
    validate(config)
    assert config.data.options == {"shards": 3} and options(config.data) == MineOptions("nowhere", 3)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    for more, words in (
        ("--config.data.options.shard=3", r"config\.data\.options\.shard: .*did you mean shards\? it has url, shards"),
        ("--config.data.options.shards=x", r"config\.data\.options\.shards is 'x'; it takes a whole number"),
        ("--config.data.options.shards=0", r"config\.data\.options\.shards is 0; it must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            read(*arguments, more)
    config.data.image_size = 64
    with pytest.raises(UserError, match="mine is of 32 px"):
        validate(config)


OWN = '''
from m2m_jax.configuration import default_config
from m2m_jax.data.pipeline import SOURCES, DataSource
from m2m_jax.diffusion.step_tables import STEPPERS
from m2m_jax.tasks.registry import TASKS

@SOURCES.register("own_source")
class OwnSource(DataSource):
    """Sets of my own."""

    @classmethod
    def open(cls, data, split):
        return SOURCES["folder"].open(data, split)

@STEPPERS.register("own_stepper")
def own_stepper(schedule, num_steps):
    """Steps of my own."""
    return STEPPERS["ddim"](schedule, num_steps)

@TASKS.register("own_task")
class OwnTask:
    """A task of my own."""

def get_config(preset):
    config = default_config()
    config.data.name = "own_source"
    config.sample.stepper = "own_stepper"
    config.task = "own_task"
    return config
'''


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    yield path
    for registry, name in ((SOURCES, "own_source"), (STEPPERS, "own_stepper"), (TASKS, "own_task")):
        forget(registry, name)


def test_a_config_file_names_what_it_registers(own_file, tmp_path):
    from data_fixtures import write_image_folder

    write_image_folder(tmp_path / "images", num_sets=20, images_per_set=4)
    for _ in range(2):  # a file that is read again registers its things anew
        config = read(f"--config={own_file}", f"--config.data.path={tmp_path / 'images'}")
        validate(config)
    assert TASKS.choose(config.task).__doc__ == "A task of my own."
    examples = open_examples(config.data, split="train", seed=0)
    assert examples[0]["images_nhwc"].shape == (4, 32, 32, 3)
    settings = build(SamplingSettings, config.sample)
    assert len(STEPPERS[settings.stepper](NoiseSchedule(), 5).timestep) == 5
    assert "own_task: A task of my own." in config_flag._help(FIELDS["task"], "own_task")


def test_the_files_in_the_documents_are_configs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)
    configs = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.py"
        path.write_text(block)
        configs.append(read(f"--config={path}", "--config.data.path=somewhere"))
        validate(configs[-1])
    forget(BETA_SCHEDULES, "quadratic")
    assert [config.schedule.beta_schedule for config in configs] == ["squaredcos_cap_v2", "quadratic"]


def test_two_things_do_not_share_a_name():
    registry = Registry("thing")
    registry.register("one")(Thing)
    with pytest.raises(ValueError, match="there is a thing 'one' already, of test_configuration"):
        registry.register("one")(Thing)
    again = {"__name__": __name__, "registry": registry}  # a module that is run again
    exec("registry.register('one')('replaced')", again)
    assert registry["one"] == "replaced"
    with pytest.raises(UserError, match=r"unknown thing 'oen'; did you mean one\? there are one"):
        registry.choose("oen")


def test_a_registry_finds_what_lies_in_its_package(tmp_path, monkeypatch):
    (tmp_path / "things").mkdir()
    registry = "from m2m_jax.core.registry import Registry\nTHINGS = Registry('thing', package='things')\n"
    (tmp_path / "things" / "__init__.py").write_text(registry)
    first = "from things import THINGS\n\n@THINGS.register('first')\nclass First: ...\n"
    (tmp_path / "things" / "first.py").write_text(first)
    monkeypatch.syspath_prepend(tmp_path)
    from things import THINGS

    assert "things.first" not in sys.modules
    assert list(THINGS) == ["first"]


def test_groups_know_their_names():
    @dataclasses.dataclass
    class Inner(Group, prefix="outer.inner."):
        number: float = field(1, "A number.", low=0)

    assert flatten(Inner()) == {"outer.inner.number": 1.0}


def test_the_field_that_named_the_second_attention_is_still_read():
    config = default_config()
    for word, attentions in {"text": ("self", "text"), "none": ("self",), "image_set": ("self", "set")}.items():
        config.model.attn2 = word
        assert config.model.attentions == attentions
    of_before = to_json(default_config())
    del of_before["model"]["attentions"]
    of_before["model"]["attn2"] = "text"
    assert from_json(of_before).model.attentions == ("self", "text")
    with pytest.raises(UserError, match=r"config.model.attn2 is 'sets'; it must be one of image_set, text, none"):
        config.model.attn2 = "sets"
