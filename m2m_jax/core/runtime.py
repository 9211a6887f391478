"""What is set before JAX starts: XLA's flags, the compilation cache, CPU devices, the other processes of a launch."""

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from m2m_jax.core import gathering
from m2m_jax.core.errors import UserError, warn

MAX_CPU_DEVICES = 8
JOIN_TIMEOUT = 300  # seconds, where M2M_JOIN_TIMEOUT does not say otherwise
# For NVIDIA's GPUs; whatever XLA_FLAGS says comes after it, and decides. Of TPUs no flag is set: libtpu's own defaults
# schedule collectives beside the computation.
GPU_XLA_FLAGS = (
    # Collectives run while the next layers are computed. (The documentation of JAX: GPU performance tips.)
    "--xla_gpu_enable_latency_hiding_scheduler=true",
)
GPU_MEMORY = "0.92"  # the default, 0.75, leaves a quarter of the memory unused
CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def start() -> None:
    """Call before anything asks JAX for devices.

    Compiled programs are kept on disk, in JAX_COMPILATION_CACHE_DIR or the user's cache folder: the second start of the
    same program compiles nothing.

    XLA's CPU backend runs most of a U-Net on one thread, and two devices run side by side: where there is no
    accelerator each core becomes a device of the mesh (a power of two, so that batches divide). Measured on 2 cores,
    training the autoencoder of configs/emoji_vae.py: 1.75 times the images a second of one device.

    Raises:
      UserError: the environment names devices that are not there, or processes that cannot meet.
    """
    set_gpu_flags()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _keep_compiled_programs()
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ
    if not chosen and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(os.cpu_count() or 1, MAX_CPU_DEVICES)
        jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))
    _join_processes()
    _find_devices()


def set_gpu_flags() -> None:
    """Set what XLA is told of GPUs, where JAX has its plugin for them; without a GPU it means nothing.

    A plain `python -m m2m_jax.train` gets what one of launch/ does, and the planner compiles what they do.
    """
    if not has_cuda_plugin():
        return
    theirs = os.environ.get("XLA_FLAGS", "").split()
    if not theirs or theirs[0].startswith("--"):  # else it names a file of flags, and whoever has one wants no others
        ours = [flag for flag in GPU_XLA_FLAGS if flag not in theirs]
        os.environ["XLA_FLAGS"] = " ".join([*ours, *theirs])
    # JAX has an older name for it, and refuses both together.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", GPU_MEMORY)


def has_cuda_plugin() -> bool:
    """Say whether JAX is installed with what it needs for NVIDIA's GPUs, be there one or not."""
    try:
        return any(importlib.util.find_spec(name) for name in CUDA_PLUGINS)
    except ModuleNotFoundError:  # not even the package around them
        return False


def _keep_compiled_programs() -> None:
    """Choose the user's cache folder. Without a home folder, as in some containers, nothing is kept."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        warn("there is no home folder to keep compiled programs in; name one in JAX_COMPILATION_CACHE_DIR")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "m2m_jax"))


def _find_devices() -> list[jax.Device]:
    """Return all devices. Raises UserError where the environment asks for some that are not there."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, where a plugin is not installed
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms:
            raise
        raise UserError(
            f"JAX_PLATFORMS={platforms}: JAX finds no such device{f' ({error})' if str(error) else ''}; "
            "install JAX for it, or unset JAX_PLATFORMS to use what is there"
        ) from error


def fix_cpu_threads() -> None:
    """Call before `start` where any number of devices, and of cores, must give the same numbers.

    XLA's CPU backend divides long sums among its threads, of which there are as many as cores or, where these are more,
    devices: the order of adding up, and so the last bit, would depend on both. Accelerators have nothing of this.
    """
    os.environ.setdefault("PJRT_NPROC", str(MAX_CPU_DEVICES))


def _join_processes() -> None:
    """Wait for the other processes of a launch, if the variable M2M_PROCESSES says that there are any.

    "auto" on TPU pods, under SLURM and on Kubernetes, where JAX finds out who they are; "1/4": the second of four,
    which meet at JAX_COORDINATOR_ADDRESS. The scripts in launch/ set it. Where one does not come, JAX ends the others,
    with SIGABRT, or raises RuntimeError where it does not even find the first: launchers start both again.

    Raises:
      UserError: the variables say nothing that can be understood.
    """
    processes = os.environ.get("M2M_PROCESSES")
    if processes is None:
        return
    who: dict[str, Any] = {}
    seconds = os.environ.get("M2M_JOIN_TIMEOUT", str(JOIN_TIMEOUT))
    if not seconds.isdecimal() or int(seconds) < 1:
        raise UserError(f"M2M_JOIN_TIMEOUT={seconds}: it must be a number of seconds")
    if processes != "auto":
        try:
            who["process_id"], who["num_processes"] = map(int, processes.split("/"))
        except ValueError:
            raise UserError(f"M2M_PROCESSES={processes}: it must be auto, or like 1/4") from None
    try:
        with _saying_who_is_missing(processes, int(seconds)):
            jax.distributed.initialize(**who, initialization_timeout=int(seconds))
    except ValueError as error:
        raise UserError(f"M2M_PROCESSES={processes}: the processes of this launch cannot meet: {error}") from error
    # Of this form are the collectives of JAX's `multihost_utils`, and of Orbax.
    devices = np.array(_find_devices()).reshape(jax.process_count(), jax.local_device_count())
    gathering.connect(Mesh(devices, ("processes", "local_devices")))


@contextmanager
def _saying_who_is_missing(processes: str, seconds: int) -> Iterator[None]:
    """After so many seconds a line of ours is followed by JAX's error, with the numbers of those who did not come.

    JAX knows them where it is the service in process 0 that gives up. But `initialize` only tells the processes how
    long to wait, and the service waits for an hour: each process would say no more than that time is up.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "an address that JAX found")
    line = (
        f"M2M_PROCESSES={processes}: the processes of this launch have not all met at {address} within {seconds} s. "
        'JAX names those that did not come, under "timed out task names"; where it does not, it is process 0'
    )
    told = threading.Timer(seconds, print, [line], {"file": sys.stderr, "flush": True})
    told.daemon = True
    from jax._src import distributed  # private: who samples, perhaps with another JAX, needs none of it

    library = distributed._jax
    start_service = library.get_distributed_runtime_service
    library.get_distributed_runtime_service = functools.partial(start_service, cluster_register_timeout=seconds)
    told.start()
    try:
        yield
    finally:
        told.cancel()
        library.get_distributed_runtime_service = start_service
