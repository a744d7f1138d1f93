"""Whether to stop: one answer for all workers, at the same step.

There are three reasons: somebody asked, and the run saves and ends; another process has taken its
folder over, and it ends without a word to it; or there is no room left for what it writes.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mambaflow.lease import taken_by
from mambaflow.run_paths import RunPaths
from mambaflow.signals import stopping
from mambaflow.storage_base import Storage
from mambaflow.training.process_group import ProcessGroup

STOP_POLL_S = 1.0  # between two looks for the file
# What a worker adds to the sum where the folder is lost, or the disk full: more than all that are
# asked to stop. The first worker alone finds either.
LOST, FULL = 1e6, 4e6


class StopSignal:
    """Whether somebody asked to stop; every worker gets the same answer at the same step.

    The first worker looks for SIGTERM, or its like, and for the file STOP. Its answer travels while
    the next step runs, so that no step waits for it.
    """

    def __init__(self, group: ProcessGroup, run: Storage) -> None:
        self.group, self.run = group, run
        self.received = False
        self.taken_by = ""
        self.full = ""
        """What there was no room for, as messages say it; told by the worker that writes."""
        self._looked = time.monotonic()
        # What was sent after the step before, and the collective that sums it up.
        self._travelling: tuple[Tensor, dist.Work | None] | None = None

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Take signals as a request; only a process's main thread can."""
        # signal.signal raises in any other. On Ray this is one: there the driver gets the signal,
        # and puts the file STOP for the first worker to find.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with stopping(self._receive, insist=False):
            yield

    def _receive(self, number: signal.Signals) -> None:
        # Nothing more: a handler may run in the middle of a step or of a save.
        self.received = True

    def agreed(self) -> str:
        """Whether all workers end after this step: "stop", "lost", "full", or "" for none; every
        one of them asks at every step."""
        self._poll()
        if self.group.size == 1:
            return _meaning(self._said)
        # The answer of a step ago, then the next question. All workers read the same sum at the
        # same step, so that none leaves while others wait for it in a collective.
        answer = self._arrived()
        # On the worker's device, since NCCL takes no other. The sum is above 0 where any worker was
        # asked: a signal need not reach all.
        flag = torch.tensor(self._said, device=self.group.device)
        self._travelling = (flag, dist.all_reduce(flag, async_op=True))
        return answer

    @property
    def _said(self) -> float:
        if self.full:
            return FULL
        return LOST if self.taken_by else float(self.received)

    def _arrived(self) -> str:
        """The answer to what was sent a step ago."""
        if self._travelling is None:
            return ""
        flag, work = self._travelling
        if work is not None:
            # Under NCCL this orders work on the GPU alone: reading the flag is what waits.
            work.wait()
        return _meaning(flag.item())

    def _poll(self) -> None:
        """Look for the file, now and then: a look may be a request to S3."""
        now = time.monotonic()
        # One worker looks for all: its answer reaches the others with the flag.
        if self.group.rank == 0 and now - self._looked > STOP_POLL_S:
            self._looked = now
            self.received = self.received or self.run.exists(RunPaths.STOP)
            self.look_for_owner()

    def look_for_owner(self) -> str:
        """Who has taken the run's folder over; "" for nobody. Asked by the worker that writes."""
        if self.group.owner and not self.taken_by:
            self.taken_by = taken_by(self.run, self.group.owner)
        return self.taken_by


def _meaning(total: float) -> str:
    if total >= FULL:
        return "full"
    return "lost" if total >= LOST else "stop" if total else ""
