"""Several processes that share the shards of one job: which are whose, and when all are there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, option

if TYPE_CHECKING:
    from m2m_jax.core.interruption import Interruption

SHARE_FLAGS = ("process_index", "process_count")  # of a command that any one process can finish, these are no part
_SECONDS_BETWEEN_LOOKS = 10.0
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedWork(Options):
    """Which share of a job is this process's.

    Example:
        SharedWork(process_index=0, process_count=2).process()  # (0, 2)
        SharedWork().process()  # as JAX says, where it joined the processes; else (0, 1)
    """

    process_index: int | None = option("Which process this is, from 0; JAX's if not given.", None)
    process_count: int | None = option("How many share the work; JAX's if not given.", None)

    def __post_init__(self):
        super().__post_init__()
        index, count = self.process_index, self.process_count
        if (index is None) != (count is None):
            raise UserError("--process_index and --process_count belong together: give both or neither")
        if index is not None and count is not None and not 0 <= index < count:
            raise UserError(f"--process_index={index} must be 0 to --process_count - 1 = {count - 1}")

    def process(self) -> tuple[int, int]:
        """Return index and count of the processes that share the shards."""
        if self.process_index is None or self.process_count is None:
            import jax

            return jax.process_index(), jax.process_count()
        return self.process_index, self.process_count


def wait_for_all(look: Callable[[], T], interruption: Interruption) -> T:
    """Return what `look` finds when the shards of all processes are there; something false while they are not.

    Waits for them, until told to stop, only where JAX joined the processes: there the end of one is the end of all.
    """
    import jax

    while not (found := look()) and jax.distributed.is_initialized() and not interruption.requested(0):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return found
