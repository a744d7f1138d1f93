"""Staging over Ray: one task makes one shard, a bounded number at a time."""

import itertools
from collections.abc import Callable, Iterator

import ray

from mambaflow.data.shard_task import ShardResult, ShardTask
from mambaflow.data.staging import make
from mambaflow.disk import FullError
from mambaflow.distributed.cluster import connect, head_watch, loss_named
from mambaflow.distributed.progress import last_line

IN_FLIGHT = 64
RETRIES = 3  # Ray's own default


def on_ray(tasks: list[ShardTask], lost: Callable[[str], None]) -> Iterator[ShardResult]:
    """Make shards on the cluster at RAY_ADDRESS or on a private one, as they are finished.

    Args:
        lost: see `connect`.

    Raises:
        What `data.staging.make` raises; storage that fails is tried again a few times.
        RunFailed: the cluster is lost.
        RuntimeError: a worker died as often as it was started.
    """
    with connect(lost), loss_named():
        yield from _made(tasks)


def _made(tasks: list[ShardTask]) -> Iterator[ShardResult]:
    # Ray tries again by itself where a worker is lost; for an exception it must be told which.
    # Storage that fails raises an OSError; damage would be there again.
    remote = ray.remote(attempt).options(
        num_cpus=1, max_retries=RETRIES, retry_exceptions=[OSError]
    )
    running = [remote.remote(task) for task in tasks[:IN_FLIGHT]]
    waiting = iter(tasks[IN_FLIGHT:])
    while running:
        done, running = ray.wait(running)  # returns with the first that is done
        running += [remote.remote(task) for task in itertools.islice(waiting, len(done))]
        yield _result(done[0])


def _result(made: ray.ObjectRef) -> ShardResult:
    try:
        found = ray.get(made)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # the task's own, as where no Ray is
    except ray.exceptions.RayError as error:
        head_watch().require()  # what it lost with its head is no worker's death
        raise RuntimeError(f"a worker failed: {last_line(error)}") from error
    if isinstance(found, FullError):
        raise found
    return found


def attempt(task: ShardTask) -> ShardResult | FullError:
    """Make a shard; a full disk is an answer and no error, which Ray would try again."""
    try:
        return make(task)
    except FullError as error:
        return error
