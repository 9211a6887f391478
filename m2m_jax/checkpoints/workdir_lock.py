"""A workdir has one owner: WORKDIR/lock says which process of which machine writes there.

A process that is killed leaves its lock behind. The next one on the machine sees that the owner is gone, and takes the
lock over. Of another machine's processes nothing can be seen; there the owner's launch decides: who is started by the
same job of a cluster (M2M_LAUNCH, which the scripts in launch/ set) comes after it, not beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError

FILE = "lock"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # of some network file systems


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process: on which machine, since which start of that, in which container, and when it began.

    A number alone is given to another process when its own has ended.
    """

    host: str
    boot: str
    container: str
    pid: int
    began: str
    launch: str
    since: str

    @classmethod
    def this_process(cls) -> Owner:
        """Return what other processes need to know of this one."""
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            container=_container(),
            pid=os.getpid(),
            began=_began(os.getpid()),
            launch=os.environ.get("M2M_LAUNCH", ""),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def is_gone(self) -> bool:
        """Tell whether the process has ended, as far as this machine and this launch can know."""
        if self.host != socket.gethostname() or (self.boot == _boot() and self.container != _container()):
            return self.launch != "" and self.launch == os.environ.get("M2M_LAUNCH")
        return self.boot != _boot() or self.pid == os.getpid() or _began(self.pid) != self.began


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Own a workdir, which is made where it is missing, until the end of the `with`. One process of a launch does so.

    Raises:
        UserError: another process owns the workdir, or it cannot be written.
    """
    path = workdir / FILE
    with disk.errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with _alone(path) as file:
            if (owner := _owner(file.read())) and not owner.is_gone():
                raise UserError(f"{workdir} is in use: {_who(owner, path)}")
            own = json.dumps(dataclasses.asdict(Owner.this_process())).encode()
            _replace(file, own)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), _alone(path) as file:
            if file.read() == own:
                path.unlink()


def _who(owner: Owner, path: Path) -> str:
    who = f"process {owner.pid} of {owner.host} has written there since {owner.since}"
    if owner.host == socket.gethostname() and owner.container == _container():
        return f"{who}; wait for it or end it (kill {owner.pid}), or name another --workdir"
    return f"{who}; wait for it or end it there, or, where it is known to be gone, remove {path}"


def _owner(text: bytes) -> Owner | None:
    """Return what a lock says; None where it says nothing: a machine that went down may leave an empty file."""
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _replace(file, text: bytes) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _alone(path: Path) -> Iterator:
    """Yield the lock's file, open, while no other process looks at it."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            # Another process may have removed the file while this one waited for it.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield file
                return


def _boot() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _container() -> str:
    """Return the space of process numbers, which containers on one machine have each their own of."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began, in the machine's ticks; an empty text where there is none, or what is left is a zombie."""
    _, _, fields = _read(f"/proc/{pid}/stat").rpartition(") ")
    state, *others = fields.split() or [""]
    return others[18] if state not in ("", "Z", "X") else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
