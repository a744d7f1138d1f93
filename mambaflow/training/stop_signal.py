"""Whether to stop: one answer for all workers, at the same step."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mambaflow.run_paths import RunPaths
from mambaflow.signals import stopping
from mambaflow.storage import Storage
from mambaflow.training.process_group import ProcessGroup

STOP_POLL_S = 1.0  # between two looks for the file


class StopSignal:
    """Whether somebody asked to stop; every worker gets the same answer at the same step.

    The first worker looks for SIGTERM, or its like, and for the file STOP. Its answer travels while
    the next step runs, so that no step waits for it.
    """

    def __init__(self, group: ProcessGroup, run: Storage) -> None:
        self.group, self.run = group, run
        self.received = False
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

    def agreed(self) -> bool:
        """Whether all workers stop after this step; every one of them asks at every step."""
        self._poll()
        if self.group.size == 1:
            return self.received
        # The answer of a step ago, then the next question. All workers read the same sum at the
        # same step, so that none leaves while others wait for it in a collective.
        answer = self._arrived()
        # On the worker's device, since NCCL takes no other. The sum is above 0 where any worker was
        # asked: a signal need not reach all.
        flag = torch.tensor(float(self.received), device=self.group.device)
        self._travelling = (flag, dist.all_reduce(flag, async_op=True))
        return answer

    def _arrived(self) -> bool:
        """The answer to what was sent a step ago."""
        if self._travelling is None:
            return False
        flag, work = self._travelling
        if work is not None:
            # Under NCCL this orders work on the GPU alone: reading the flag is what waits.
            work.wait()
        return bool(flag.item())

    def _poll(self) -> None:
        """Look for the file, now and then: a look may be a request to S3."""
        now = time.monotonic()
        # One worker looks for all: its answer reaches the others with the flag.
        if self.group.rank == 0 and now - self._looked > STOP_POLL_S:
            self._looked = now
            self.received = self.received or self.run.exists(RunPaths.STOP)
