"""What a worker's process takes of its machine: cores and memory."""

import ctypes
import io
import os
import platform
import sys
from typing import NoReturn

import torch

from mambaflow.variables import number

FAILED = 1  # the exit code of a job that failed
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def cores() -> int:
    """Cores that this process may use, or MAMBAFLOW_CORES of them.

    Raises:
        ValueError: MAMBAFLOW_CORES is no whole number above 0.
    """
    if stated := number("MAMBAFLOW_CORES"):
        return stated
    if hasattr(os, "sched_getaffinity"):  # what a container or taskset grants, not what there is
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_threads(workers: int, threads: int = 0) -> None:
    """Give this worker its threads: MAMBAFLOW_THREADS, else `threads`, else its share of the
    node's cores.

    Launchers leave each worker one thread (OMP_NUM_THREADS=1) however many cores there are.

    Args:
        workers: how many workers this node has.
        threads: as a configuration states them; 0: it states none.

    Raises:
        ValueError: MAMBAFLOW_THREADS is no whole number above 0.
    """
    # With more OpenMP threads than cores each of them sleeps at every barrier.
    share = max(1, cores() // workers)
    # What this machine says wins over what a run says anywhere.
    torch.set_num_threads(number("MAMBAFLOW_THREADS") or threads or share)


def speak_plainly() -> None:
    """Have this process's output put '?' for what its encoding does not know, rather than end a
    job that has done its work: a log in ASCII has no ± and no é."""
    for stream in (sys.stdout, sys.stderr):
        # What stands in for them, in a notebook say, need not be able to.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def leave(code: int) -> NoReturn:
    """End this process with an exit code; with that of failure at once. A thread that still waits
    for a cluster that is lost would crash the interpreter as it ends, or hold it up."""
    if code != FAILED:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


# `keep_memory` for a process that trains in a thread, in the environment that it starts with:
# threads other than the first allocate from arenas of their own, which keep no large block.
KEEP_MEMORY = {
    # Read by glibc as a process starts: who sets them for itself is too late. One arena is the
    # first thread's, for all threads.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


def keep_memory() -> bool:
    """Have the allocator keep what it is given back; False where it is not glibc's.

    glibc asks the system for every tensor above 32 MiB, and returns it: the pages of each are
    zeroed and mapped anew at every step, 80,000 of them in V1's on CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # What came from mmap is unmapped when it is given back: no block is to. And the heap keeps what
    # is free at its top, up to 2 GiB: mallopt takes an int.
    wanted = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
    # A list: `all` of a generator would leave out the second where the first is refused.
    return all([mallopt(name, value) == 1 for name, value in wanted.items()])
