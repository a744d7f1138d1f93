"""What a batch system sends: taken as one request to stop, and kept away from Ray.

Slurm signals every process of a step. Ray's would die of it before the command could ask its
workers for a checkpoint.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Asked:
    """The first signal that asked to stop, by name; "" while none did."""

    def __init__(self) -> None:
        self.name = ""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Nothing more: what is due is done by the loop that looks.
        self.name = self.name or signal.Signals(number).name

    @contextlib.contextmanager
    def catching(self) -> Iterator["Asked"]:
        before = {number: signal.signal(number, self._receive) for number in ASKING}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def withheld(*numbers: signal.Signals) -> Iterator[None]:
    """What is started in here, and its descendants, never get these signals: a mask outlives exec,
    and, unlike a signal that is ignored, programs that install a handler of their own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
