"""Who trains together, and where a run is: what a worker knows of the others."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mambaflow.training.loop import Forward


@dataclass(frozen=True)
class RunProgress:
    """Where a run is: what a progress bar shows."""

    step: int
    steps: int
    loss: float
    samples_per_second: float


class ProcessGroup:
    """Who trains together. This one is a process alone, or one of those that torchrun started."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device

    def wrap(self, model: nn.Module) -> Forward:
        """The model with its gradients averaged over the workers."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def report_checkpoint(self, scores: dict[str, float], uri: str) -> None:
        """Called by every worker after a checkpoint is in place."""

    def report_progress(self, point: RunProgress) -> None:
        """Called by the first worker with news."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the workers."""
        if self.size > 1:
            dist.all_reduce(values)
        return values
