"""What ends a private Ray whose driver is gone: a process of its own, and this file its program.

Ray's processes watch one another, yet when a driver is killed its agents stay for a minute and its
folder for good. Who was killed cannot tidy up, so that somebody else must. The program starts
before every private Ray, bare and in milliseconds: it imports the standard library alone.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "MAMBAFLOW_PRIVATE_RAY"
# Ray's workers end by themselves within 3 s of their driver; what is left after GRACE_S is killed,
# and what cannot be killed is given up after LIMIT_S. A driver waits WAIT_S for all that.
GRACE_S, LIMIT_S, WAIT_S = 5.0, 60.0, 10.0
LOOK_S, PARENT_S = 0.1, 1.0  # between two looks for processes; for the driver


@contextlib.contextmanager
def reaper(folder: str) -> Iterator[None]:
    """When this context ends, or this process, in whatever way, so do the processes that have the
    folder in their command line or environment, and the folder with them."""
    # They are found in /proc, which Linux alone has: elsewhere a killed driver leaves them.
    if sys.platform != "linux":
        yield
        return
    process = _started(folder)
    try:
        yield
    finally:
        # A word, not just the pipe's end: a fork of ours may hold the pipe open.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(b"done", WAIT_S)


def _started(folder: str) -> subprocess.Popen[bytes]:
    """The reaper's process; whatever is started after it does not inherit our end of its pipe."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, folder, str(os.getpid())],
        stdin=subprocess.PIPE,
        # Whoever reads the driver's output to its end must not wait for the reaper.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what a terminal sends to the driver's group is not meant for it
    )


@contextlib.contextmanager
def named(folder: str) -> Iterator[None]:
    """What is started in here, and its descendants, has the folder in its environment.

    Narrower than `reaper`, whose context may start processes that are not Ray's and are to stay.
    """
    # Ray's agents put a title over their command line and, but for SPT_NOENV, their environment.
    added = {VARIABLE: folder, "SPT_NOENV": "1"}
    before = {name: os.environ[name] for name in added if name in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        os.environ.update(before)


def _watch(folder: str, driver: int) -> None:
    """Wait for the driver's word, or for its end; then reap."""
    # Batch systems send SIGTERM to everybody: the driver then stops in order, and we after it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Without a driver we are somebody else's child, whoever still holds the pipe.
    while os.getppid() == driver and not select.select([0], [], [], PARENT_S)[0]:
        pass
    reap(folder, {os.getpid(), driver})


def reap(folder: str, spared: set[int], grace_s: float = GRACE_S) -> None:
    """Remove the folder once the processes that name it have ended, by themselves or by force."""
    start = time.monotonic()
    while (pids := naming(folder) - spared) and time.monotonic() < start + LIMIT_S:
        if time.monotonic() > start + grace_s:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_S)
    shutil.rmtree(folder, ignore_errors=True)


def naming(folder: str) -> set[int]:
    """The processes with the folder in their command line or environment."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            if folder.encode() in text:
                found.add(int(entry.name))
    return found


if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]))
