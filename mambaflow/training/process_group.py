"""Who trains together: what a worker knows of the others, whoever started them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mambaflow.host import keep_memory, share_threads
from mambaflow.training.loop import Forward
from mambaflow.variables import launched, number

# Seconds until a collective on Ray fails for want of a worker; Ray's own default is 1800.
COLLECTIVE_TIMEOUT_S = 600
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Where a run is: what a progress bar shows."""

    step: int
    steps: int
    loss: float
    samples_per_second: float


class ProcessGroup:
    """The workers of a run, as one of them sees them. This one is a process alone, or one of those
    that torchrun started; Ray's is `distributed.train.RayProcessGroup`.

    Args:
        rank: of this worker; the first, 0, also logs, saves and reports.
        size: how many there are.
        device: where this one computes.
        watch: called by `report_progress`.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.rank, self.size, self.device, self.watch = rank, size, device, watch
        self.owner = 0
        """Under which number the run's folder is theirs (see `lease`); 0 where nobody asks."""

    def wrap(self, objective: nn.Module) -> Forward:
        """The objective with its gradients averaged over the workers."""
        # DDP copies the first worker's weights to all as it is made: restore before.
        return nn.parallel.DistributedDataParallel(objective) if self.size > 1 else objective

    def report_checkpoint(self, scores: dict[str, float], uri: str) -> None:
        """Called by every worker once it has done its part in a checkpoint; it returns when the
        first, which writes it, has: what comes next may read it."""
        self.all_reduce(torch.zeros(()))

    def report_progress(self, progress: Progress) -> None:
        """Called by the first worker with news."""
        self.watch(progress)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the workers, on the device where the values are."""
        if self.size == 1:
            return values
        # NCCL takes tensors of its GPU alone. A copy, since all_reduce works in place.
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def broadcast(self, value: T) -> T:
        """The first worker's value, to all of them; anything that can be pickled."""
        values = [value]
        if self.size > 1:
            # Under NCCL the pickle travels by the current GPU, which `launched_group` has set.
            dist.broadcast_object_list(values, src=0)
        return values[0]


def launched_workers() -> int:
    """How many processes torchrun started; 1 where it did not.

    Raises:
        ValueError: WORLD_SIZE is no whole number above 0.
    """
    return number("WORLD_SIZE", 1)


@contextlib.contextmanager
def launched_group(use_gpu: bool, threads: int = 0) -> Iterator[ProcessGroup]:
    """This process, alone or among those that torchrun started, which find one another here.

    Takes its share of the machine: its GPU, and its part of the cores or so many `threads`.
    """
    place = launched()
    device = torch.device("cuda", place.local_rank) if use_gpu else None
    if device is not None:
        # Before the group: NCCL and pinned memory take the current GPU, which is otherwise the
        # first one in every process.
        torch.cuda.set_device(device)
    share_threads(place.local_size, threads)
    # By a call, since training is in the main thread; a thread of Ray's needs KEEP_MEMORY.
    keep_memory()
    if place.size > 1:
        # Rank, size and address are in the environment, put there by torchrun.
        dist.init_process_group("nccl" if use_gpu else "gloo")
    yield ProcessGroup(place.rank, place.size, device or torch.device("cpu"))
    # Not where training failed: the others wait in a collective, and to leave it hangs with them.
    if place.size > 1:
        dist.destroy_process_group()
