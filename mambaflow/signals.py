"""What asks a process to stop: SIGTERM, and what batch systems send in its place.

Slurm warns with the signal that a job asked for, USR1 or USR2 by custom; a lost terminal sends HUP.
Each of them would end a process that does not know it, before it could save.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
REPEAT_S = 5.0  # batch systems send several in a row, which are one request
# The exit code of a job that was asked to stop: what a shell says of one that SIGTERM ended.
STOPPED = 128 + signal.SIGTERM
log = logging.getLogger(__name__)


@contextlib.contextmanager
def stopping(
    ask: Callable[[signal.Signals], None], *more: signal.Signals, insist: bool = True
) -> Iterator[None]:
    """Call `ask` once, with the first of the signals that ask to stop, or of `more`; only in a
    process's main thread.

    Args:
        insist: whether another one ends the process at once. Of those that batch systems send it is
            another one after REPEAT_S; of `more`, such as a second Ctrl-C, at once.
    """
    first: list[float] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            ask(signal.Signals(number))
        elif insist and (number in more or time.monotonic() > first[0] + REPEAT_S):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, receive) for number in (*ASKING, *more)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Asked to stop in here, a job leaves at once, but by its own way out: what it owns is given
    back, and a private Ray ended. For all of a job around what saves first, which has a `stopping`
    of its own."""

    def leave(number: signal.Signals) -> None:
        log.info("asked to stop by %s: leaving", number.name)
        raise SystemExit(STOPPED)

    with stopping(leave):
        yield


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is called in here leaves handlers of signals as they are: Ray takes SIGTERM's, and ends
    its driver with 1 as it starts a node, and with 15 later."""
    if threading.current_thread() is not threading.main_thread():  # where nobody can set one
        yield
        return
    before = {number: signal.getsignal(number) for number in ASKING}
    try:
        yield
    except SystemExit as end:
        # By one of those handlers, or by `leaving`.
        end.code = STOPPED
        raise
    finally:
        # None is a handler that is not of Python's: it can be neither seen nor set.
        for number, handler in before.items():
            if handler is not None:
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
