"""Who owns a folder: one living process at a time, by a file that it renews.

    owner/0001.json    the first owner's: host, process, how often it was renewed, whether it ended
    owner/0002.json    that of who came after it

A file is created by one process alone, and the highest is the owner's. No clocks are compared,
which may differ between machines: who wants the folder watches the owner's file, and takes over
when it has not changed for a while. Where the owner was a process of this machine that is gone, at
once.
"""

import contextlib
import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mambaflow.checks import require
from mambaflow.storage_base import Storage, StorageError

FOLDER = "owner/"
# Seconds between renewals, and without one after which an owner is taken to be gone.
RENEW_S, VALID_S = 5.0, 20.0
# When a process began of which nothing can be seen but that it lives.
HIDDEN = "?"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """A process that owns, or owned, a folder."""

    host: str
    process: int
    began: str
    """What tells the process from a later one of the same number, on the same host."""
    identity: str
    renewals: int = 0
    ended: bool = False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended: it said so, or was here and is no more."""
        here = self.host == _host()
        return self.ended or (here and _began(self.process) not in (self.began, HIDDEN))


def _host() -> str:
    # The boot too: after a restart of the machine no process of before is alive. And which
    # processes can be seen: containers of one machine may all be called as it is.
    boot, seen = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [platform.node()]
    parts += [boot.read_text()[:8]] if boot.exists() else []
    parts += [re.sub(r"\D", "", os.readlink(seen))] if os.path.lexists(seen) else []
    return "/".join(parts)


def _began(process: int) -> str:
    """When a process of this machine began, in ticks of its clock; "" where there is none, HIDDEN
    where that cannot be seen."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        # No such process; or one that is hidden from others than its user; or no /proc, where a
        # living one is only told from a dead one.
        return HIDDEN if _lives(process) else ""
    # Behind the name, which may hold anything: state is the first field there, the beginning the
    # twentieth. A zombie has ended.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        return True
    except OSError:
        return False
    return True


def newest(storage: Storage) -> int:
    """The number of the folder's newest owner; 0 where it has had none."""
    return max((_number(key) for key in storage.list(FOLDER)), default=0)


@contextlib.contextmanager
def owning(storage: Storage, what: str, take_over: bool = False) -> Iterator[int]:
    """Own a folder while this lasts, under the number that this gives; others are refused.

    Args:
        what: what messages call it.
        take_over: whether to take it from an owner that lives, too.

    Raises:
        ValueError: another process owns it, and lives.
    """
    number = newest(storage)
    if number and not take_over:
        _await_end(storage, number, what)
    mine = Owner(_host(), os.getpid(), _began(os.getpid()), uuid.uuid4().hex)
    created = storage.create(_key(number + 1), _text(mine))
    require(created, f"{what} has just been taken by another process; let that one go on")
    stop = threading.Event()
    # A thread, so that no step and no save is too long for it.
    thread = threading.Thread(target=_renew, args=(storage, number + 1, mine, stop), daemon=True)
    thread.start()
    try:
        yield number + 1
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(StorageError):
            storage.write(_key(number + 1), _text(replace(mine, ended=True)))


def taken_by(storage: Storage, number: int) -> str:
    """Who has come after the owner of this number, as messages call them; "" for nobody."""
    now = newest(storage)
    return "" if now <= number else str(_read(storage, now) or "another process")


def _await_end(storage: Storage, number: int, what: str) -> None:
    """Wait until an owner is known to have ended, or has not renewed for a while."""
    first = owner = _read(storage, number)
    since = time.monotonic()
    while owner is not None and not owner.is_gone:
        require(
            owner == first,
            f"{what} is owned by {owner}, which lives; stop it first (Ctrl-C there, or a file STOP "
            "in its folder), or use --take-over",
        )
        waited = time.monotonic() - since
        if waited > VALID_S:
            return
        if waited < 1:
            log.info("%s: waiting up to %.0f s for %s to show that it lives", what, VALID_S, owner)
        time.sleep(1.0)
        owner = _read(storage, number)


def _renew(storage: Storage, number: int, mine: Owner, stop: threading.Event) -> None:
    renewals = 0
    while not stop.wait(RENEW_S):
        renewals += 1
        try:
            storage.write(_key(number), _text(replace(mine, renewals=renewals)))
        # The next one may do; whoever wants the folder waits for several.
        except OSError as error:
            log.warning("could not renew %s/%s: %s", storage.uri, _key(number), error)


def _read(storage: Storage, number: int) -> Owner | None:
    """An owner; None where its file is gone, or is of another version."""
    try:
        return Owner(**json.loads(storage.read(_key(number))))
    except (FileNotFoundError, TypeError, ValueError):
        return None


def _key(number: int) -> str:
    return f"{FOLDER}{number:04d}.json"


def _number(key: str) -> int:
    digits = key.removeprefix(FOLDER).removesuffix(".json")
    return int(digits) if digits.isdigit() else 0


def _text(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()
