"""What workers tell the driver while they work: where the run is, and what they log."""

import logging
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mambaflow.training.process_group import Progress

Line = tuple[int, str, str]
"""Level, name of the logger, text."""
Report = dict[str, Any]
"""What workers say at a checkpoint: scores, `step`, `seconds`, and its address."""


class ProgressActor:
    """Keeps the newest progress of a run and what its workers log, for the driver to show."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.lines: list[Line] = []
        self.reports: list[Report] = []

    def report_progress(self, progress: Progress) -> None:
        """Replace the progress."""
        self.progress = progress

    def log(self, level: int, name: str, text: str) -> None:
        """Add a line of a log."""
        self.lines.append((level, name, text))

    def report_checkpoint(self, report: Report) -> None:
        """Add what was said at a checkpoint."""
        self.reports.append(report)

    def news(self) -> tuple[Progress | None, list[Line], list[Report]]:
        """The newest progress, and the lines and reports since the last call."""
        # An actor answers one call at a time: no line comes between the two and is lost.
        lines, self.lines = self.lines, []
        reports, self.reports = self.reports, []
        return self.progress, lines, reports


def start_progress_actor() -> Any:
    """A progress actor on the driver's own node, so that it lives as long as the driver."""
    # soft=False: here or nowhere, since a run outlives the loss of any other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # No CPU of its own: on a node whose cores are all in training it would wait forever.
    return ray.remote(num_cpus=0)(ProgressActor).options(scheduling_strategy=here).remote()


class ActorLogHandler(logging.Handler):
    """Sends a worker's log to the actor: the first worker's whole, of others the warnings."""

    def __init__(self, actor: Any, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self.actor, self.rank = actor, rank

    def emit(self, record: logging.LogRecord) -> None:
        text = f"[worker {self.rank}] {self.format(record)}"
        self.actor.log.remote(record.levelno, record.name, text)  # sent, not waited for


class ControllerReporter(ray.train.UserCallback):
    """Tells the actor of checkpoints, and which workers failed; runs in Ray's controller."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Called once all workers have reported, which say the same."""
        self.actor.report_checkpoint.remote(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called each time that workers fail, before they are replaced or the run ends."""
        for rank, error in sorted(worker_exceptions.items()):
            text = f"worker {rank} failed: {last_line(error)}"
            # The controller is a process of its own: the driver does not see what it logs.
            self.actor.log.remote(logging.WARNING, __name__, text)


def last_line(error: BaseException) -> str:
    """What a person wants to read of a traceback, or of Ray's page about a lost worker."""
    # A traceback ends with the error itself.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
