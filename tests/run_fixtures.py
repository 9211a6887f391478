"""The programs of this project run inside the test process, and what several test files share: one trained tiny run.

In a test module:

    @pytest.fixture(scope="module")
    def tiny_run(tmp_path_factory):
        return train_tiny(tmp_path_factory)
"""

import contextlib
import fcntl
import io
import os
import pathlib
import runpy
import socket
import sys
from typing import NamedTuple
from unittest import mock

from absl import flags
from data_fixtures import build_emoji

from m2m_jax import config_flag
from m2m_jax.configuration import Config
from m2m_jax.core.parameters import initial
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.diffusers_folder import save_autoencoder

ROOT = pathlib.Path(__file__).parents[1]
# A U-Net of one level, which compiles in a third of the time; those of two are trained in test_train_numbers.py
# and test_text_to_image.py.
ONE_LEVEL = (
    "--config.model.block_out_channels=(16,)",
    "--config.model.down_block_types=('CrossAttnDownBlock2D',)",
    "--config.model.num_attention_heads=(2,)",
)


class Result(NamedTuple):
    """Exit code and output of a program."""

    code: int
    out: str
    err: str


def run(module: str, *arguments: object) -> Result:
    """`python -m m2m_jax.MODULE ARGUMENTS` without a process of its own, which would take seconds to import JAX.

    Exceptions other than SystemExit, which would be a traceback there, are raised.
    """
    argv = [module, *map(str, arguments)]
    code = 0
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            runpy.run_module(f"m2m_jax.{module}", run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        # The next program defines flags of the same names.
        own = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(module, ())}
        for name in [name for name in flags.FLAGS if name in own or name.partition(".")[0] == "config"]:
            delattr(flags.FLAGS, name)
    return Result(code, out.getvalue(), err.getvalue())


def load_config(name: str) -> Config:
    """The config that `config_argument` of that name says: "emoji" or, with a preset, "emoji:tiny"."""
    return config_flag.load_config(config_argument(name).partition("=")[2])


def free_address() -> str:
    """Where the processes of a launch on this machine can meet."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"localhost:{free.getsockname()[1]}"


def config_argument(name: str) -> str:
    """--config=configs/NAME.py[:PRESET], for `name` "emoji" or "emoji:tiny"."""
    file, colon, preset = name.partition(":")
    return f"--config={ROOT / 'configs' / file}.py{colon}{preset}"


def make_autoencoder(folder: pathlib.Path) -> pathlib.Path:
    """A folder with a random autoencoder, 32 px to 8x8x4 latents of about unit variance."""
    config = AutoencoderConfig(
        block_out_channels=(16, 16, 16), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
    )
    save_autoencoder(folder, config, initial(lambda rngs: AutoencoderKL(config, rngs=rngs), seed=0))
    return folder


def one_level_arguments(tmp_path_factory) -> tuple[str, ...]:
    """Of a run like that of `train_tiny`, with a folder of its own for the autoencoder."""
    return _tiny_arguments(build_emoji(tmp_path_factory), make_autoencoder(tmp_path_factory.mktemp("vae")))


def _tiny_arguments(emoji_directory: str, autoencoder: pathlib.Path) -> tuple[str, ...]:
    return (
        config_argument("emoji:tiny"),
        *ONE_LEVEL,
        "--config.data.log_examples=True",
        f"--config.data.directory={emoji_directory}",
        f"--config.autoencoder.path={autoencoder}",
    )


class Tiny(NamedTuple):
    """workdir: of a run. arguments: its preset, and what makes it smaller and finds its data and its autoencoder."""

    workdir: pathlib.Path
    arguments: tuple[str, ...]
    emoji_directory: str
    autoencoder: pathlib.Path
    out: str


def train_tiny(tmp_path_factory) -> Tiny:
    """The one run of `configs/emoji.py:tiny`, of one level, of this test session; whoever comes first trains it."""
    emoji_directory = build_emoji(tmp_path_factory)
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "tiny"
    arguments = _tiny_arguments(emoji_directory, folder / "vae")
    with open(root / "tiny.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = folder / "stdout.txt"
        if not printed.exists():
            make_autoencoder(folder / "vae")
            result = run("train", *arguments, f"--workdir={folder / 'run'}")
            assert result.code == 0, result.err
            printed.write_text(result.out)
    return Tiny(folder / "run", arguments, emoji_directory, folder / "vae", printed.read_text())
