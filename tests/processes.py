"""Processes that a test starts: found by a mark in their environment, and killed."""

import contextlib
import os
import signal
import time
from pathlib import Path


def kill(mark: str) -> list[str]:
    """SIGKILL to the processes with a mark; the titles of those that there were."""
    found = processes(mark)
    for pid, _ in found:
        with contextlib.suppress(ProcessLookupError):  # ended with one before it
            os.kill(pid, signal.SIGKILL)
    return [title for _, title in found]


def processes(mark: str) -> list[tuple[int, str]]:
    """(pid, title) of the processes with a mark, this one apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and int(folder.name) != os.getpid()
            ):
                found.append((int(folder.name), (folder / "cmdline").read_text()))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended
    return found


def wait_for(what, seconds: float = 120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"nothing after {seconds} s")
