"""Several processes that share the shards of one job: which are whose, and when all are there.

Two flags of the programs that import this.
"""

import shlex
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import jax
from absl import flags

from m2m_jax.core.errors import UserError
from m2m_jax.core.interruption import Interruption

PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "Which process this is, from 0; JAX's if not given.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "How many share the work; JAX's if not given.")

_SECONDS_BETWEEN_LOOKS = 10.0
T = TypeVar("T")


def check_process_flags() -> None:
    """Raises UserError where only one is given, before anything is opened."""
    if (PROCESS_INDEX.value is None) != (PROCESS_COUNT.value is None):
        raise UserError("--process_index and --process_count belong together: give both or neither")


def process() -> tuple[int, int]:
    """Index and count of the processes that share the shards."""
    if PROCESS_COUNT.value is None:
        return jax.process_index(), jax.process_count()
    index, count = PROCESS_INDEX.value, PROCESS_COUNT.value
    if not 0 <= index < count:
        raise UserError(f"--process_index={index} must be 0 to --process_count - 1 = {count - 1}")
    return index, count


def wait_for_all(look: Callable[[], T], interruption: Interruption) -> T:
    """What `look` finds when the shards of all processes are there; something false while they are not.

    Waits for them, until told to stop, only where JAX joined the processes: there the end of one is the end of all.
    """
    while not (found := look()) and jax.distributed.is_initialized() and not interruption.requested(0):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return found


def command(module: str) -> str:
    """What was called, less the division of the work: any one process can finish it."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        if argument.lstrip("-").startswith((PROCESS_INDEX.name, PROCESS_COUNT.name)):
            if "=" not in argument:
                next(arguments, None)  # its value
        else:
            kept.append(argument)
    return shlex.join(["python", "-m", module, *kept])
