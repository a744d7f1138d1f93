"""Whether to stop: one answer for all workers, at the same step."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mambaflow.storage import Storage
from mambaflow.training.process_group import ProcessGroup

STOP = "STOP"
STOP_POLL_S = 1.0


class StopSignal:
    """Whether somebody asked to stop; every worker gets the same answer at the same step.

    The first worker looks for SIGTERM and for the file STOP. Its answer travels while the next
    step runs, so that no step waits for it.
    """

    def __init__(self, group: ProcessGroup, run: Storage) -> None:
        self.group, self.run = group, run
        self.asked = False
        self._looked = time.monotonic()
        self._travelling: tuple[Tensor, dist.Work | None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a request; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def stop(self) -> bool:
        """Whether to stop after this step."""
        self._look()
        if self.group.size == 1:
            return self.asked
        answer = self._arrived()
        flag = torch.tensor(float(self.asked), device=self.group.device)
        self._travelling = (flag, dist.all_reduce(flag, async_op=True))
        return answer

    def _arrived(self) -> bool:
        if self._travelling is None:
            return False
        flag, work = self._travelling
        if work is not None:
            work.wait()
        return bool(flag.item())

    def _look(self) -> None:
        now = time.monotonic()
        if self.group.rank == 0 and now - self._looked > STOP_POLL_S:
            self._looked = now
            self.asked = self.asked or self.run.exists(STOP)
