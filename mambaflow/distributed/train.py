"""The one room that imports Ray: a cluster to work on, and training on it.

Ray's own defaults are replaced where they are known to hurt: authentication is stated, never
guessed; every wait and every retry is bounded, except that an elastic run waits without limit
while it has fewer than min_workers; a worker reports only at checkpoints, since a report is a
barrier across all workers and takes as long as the controller's next poll.

Ray hears of scores and addresses, and keeps no checkpoints: its own book of them would list the
ones that we prune, and then refuse to resume. What a run keeps is in its storage, put there and
read back by `mambaflow.training.checkpoint`; Ray's own files go to a scratch folder.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mambaflow.checks import require
from mambaflow.config import RunConfig, ScaleConfig, from_dict, to_dict
from mambaflow.data.shards import ShardError
from mambaflow.distributed.cluster import LOCAL, cluster_address, ray
from mambaflow.host import share_threads
from mambaflow.models.weights import CheckpointError
from mambaflow.training.loop import Forward
from mambaflow.training.process_group import ProcessGroup, RunProgress
from mambaflow.training.run import Outcome, RunFailed, check_storage, train

log = logging.getLogger(__name__)
COLLECTIVE_TIMEOUT_S = 600
CONTROLLER_FAILURES = 5
PATIENCE_S, SOON_S = 300.0, 5.0
WATCH_S = 0.5
GROWTH_S = 60.0


def check_room(scale: ScaleConfig) -> None:
    """Refuse more workers than a private cluster can ever hold; a shared one may still grow.

    Raises:
        ValueError: num_workers exceeds this machine's cores or GPUs; MAMBAFLOW_GROWTH_S is no
            number of seconds.
    """
    _growth_s()
    if cluster_address() == LOCAL:
        require(not _missing(scale), _missing(scale))


def _growth_s() -> float:
    """Seconds between two looks for nodes to grow on. A run that grows repeats the steps since
    its last checkpoint, so that it does not follow every node that joins."""
    text = os.environ.get("MAMBAFLOW_GROWTH_S") or str(GROWTH_S)
    good = re.fullmatch(r"\d+(\.\d+)?", text) is not None
    require(good, f"MAMBAFLOW_GROWTH_S (={text!r}) must be a number of seconds; use 60")
    return float(text)


def _missing(scale: ScaleConfig) -> str:
    """What the connected cluster lacks for the fewest workers of the run; "" for nothing."""
    workers, have = scale.world_sizes[0], ray.cluster_resources()
    name = "min_workers" if scale.min_workers else "num_workers"
    for kind in ("CPU", "GPU") if scale.use_gpu else ("CPU",):
        count = int(have.get(kind, 0))
        if count < workers:
            return (
                f"{name} (={workers}) needs {workers} {kind}s, and the cluster has {count}; "
                f"use {name}={count} or fewer, or add nodes"
            )
    return ""


def await_room(scale: ScaleConfig, patience_s: float = PATIENCE_S) -> None:
    """Wait until the cluster has room for the fewest workers of the run.

    The request is one that an autoscaler sees and answers with nodes.

    Raises:
        RunFailed: there was no room for `patience_s` seconds.
    """
    bundle = {"CPU": 1, "GPU": 1} if scale.use_gpu else {"CPU": 1}
    group = placement_group([bundle] * scale.world_sizes[0])
    try:
        if group.wait(SOON_S):
            return
        why = _missing(scale) or "other work holds the CPUs or GPUs of the cluster"
        log.warning("waiting up to %.0f s for room: %s", patience_s, why)
        if not group.wait(patience_s):
            raise RunFailed(f"no room on the cluster for {patience_s:.0f} s: {why}")
    finally:
        remove_placement_group(group)


class ProgressActor:
    """Where workers pin the newest point of a run and what they log, for the driver to show."""

    def __init__(self) -> None:
        self.point: RunProgress | None = None
        self.lines: list[tuple[int, str, str]] = []

    def report_progress(self, point: RunProgress) -> None:
        """Replace the point."""
        self.point = point

    def say(self, level: int, name: str, text: str) -> None:
        """Add a line of a log."""
        self.lines.append((level, name, text))

    def news(self) -> tuple[RunProgress | None, list[tuple[int, str, str]]]:
        """The newest point, and the lines since the last call."""
        lines, self.lines = self.lines, []
        return self.point, lines


def _board() -> Any:
    """A board on the driver's own node, so that it lives as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(ProgressActor).options(scheduling_strategy=here).remote()


class ActorLogHandler(logging.Handler):
    """A worker's log, told to the board: the first worker's whole, of others the warnings."""

    def __init__(self, board: Any, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self.board, self.rank = board, rank

    def emit(self, record: logging.LogRecord) -> None:
        text = f"[worker {self.rank}] {self.format(record)}"
        self.board.say.remote(record.levelno, record.name, text)


class FailureReporter(ray.train.UserCallback):
    """Tells the board which workers failed; runs in Ray's controller."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called each time that workers fail, before they are replaced or the run ends."""
        for rank, error in sorted(worker_exceptions.items()):
            text = f"worker {rank} failed: {_last_line(error)}"
            self.board.say.remote(logging.WARNING, __name__, text)


def _last_line(error: BaseException) -> str:
    """What a person wants to read of a traceback, or of Ray's page about a lost worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


class RayProcessGroup(ProcessGroup):
    """One worker of Ray Train."""

    def __init__(self, board: Any) -> None:
        context = ray.train.get_context()
        super().__init__(
            context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
        )
        self.board = board

    def wrap(self, model: torch.nn.Module) -> Forward:
        return ray.train.torch.prepare_model(model, move_to_device=False)

    def report_checkpoint(self, scores: dict[str, float], uri: str) -> None:
        """Tell Ray of a checkpoint that is in place: others wait here for the first worker."""
        ray.train.report({**scores, "checkpoint": uri})

    def report_progress(self, point: RunProgress) -> None:
        self.board.pin.remote(point)


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs: the job of training, in Ray's world."""
    config, group = from_dict(settings["run"]), RayProcessGroup(settings["board"])
    share_threads(ray.train.get_context().get_local_world_size())
    told = ActorLogHandler(group.board, group.rank)
    logging.getLogger("mambaflow").addHandler(told)
    check_storage(config)
    outcome = train(config, group)
    return {"status": outcome.status, "step": outcome.step}


def train_on_ray(config: RunConfig, watch: Callable[[RunProgress], None]) -> Outcome:
    """Train through Ray Train on the connected cluster, and wait for the end.

    Args:
        watch: called about twice a second with the newest point of the run.

    Raises:
        RunFailed: no room for the workers, or they failed more often than max_failures.
    """
    await_room(config.scale)
    board = _board()
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as scratch:
        trainer = _trainer(config, board, scratch)
        try:
            result = _watched(trainer.fit, board, watch)
        except ray.train.TrainingFailedError as error:
            raise _found_damage(error) or RunFailed(_account(error, config.scale)) from error
    return Outcome(**result.return_value)


def _trainer(config: RunConfig, board: Any, scratch: str) -> Any:
    scale = config.scale
    workers = scale.num_workers if not scale.min_workers else (scale.min_workers, scale.num_workers)
    settings = {"run": to_dict(config), "board": board}
    api: Any = ray.train  # Ray's type hints are those of Train V1, and V2 is what runs
    return api.torch.TorchTrainer(
        work,
        train_loop_config=settings,
        torch_config=api.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=api.ScalingConfig(
            num_workers=workers,
            use_gpu=scale.use_gpu,
            elastic_resize_monitor_interval_s=_growth_s(),
        ),
        run_config=api.RunConfig(
            name=config.run_name,
            storage_path=scratch,
            failure_config=api.FailureConfig(
                max_failures=scale.max_failures,
                # A lost node costs one of each where its place is waited for in vain.
                controller_failure_limit=CONTROLLER_FAILURES + scale.max_failures,
            ),
            callbacks=[FailureReporter(board)],
            logging_config=api.LoggingConfig("WARNING"),
        ),
    )


def _found_damage(error: ray.train.TrainingFailedError) -> ValueError | None:
    """The damaged shard or checkpoint for which workers failed, if that is why."""
    for cause in getattr(error, "worker_failures", {}).values():
        found = getattr(cause, "_base_exc", cause)
        if isinstance(found, ShardError | CheckpointError):
            return found
    return None


def _account(error: ray.train.TrainingFailedError, scale: ScaleConfig) -> str:
    """Why a run ended without a result."""
    if isinstance(error, ray.train.WorkerGroupError):
        rank, cause = min(error.worker_failures.items())
        times = scale.max_failures + 1
        return f"workers failed {times} times (max_failures={scale.max_failures}); " + (
            f"the last time worker {rank}: {_last_line(cause)}"
        )
    return _missing(scale) or _last_line(error)


def _watched(fit: Callable[[], Any], board: Any, watch: Callable[[RunProgress], None]) -> Any:
    """Run `fit` in a thread, while this one, which is where signals arrive, shows the news."""
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(fit)
        while not wait([ending], timeout=WATCH_S).done:
            _show(board, watch)
        _show(board, watch)
        return ending.result()


def _show(board: Any, watch: Callable[[RunProgress], None]) -> None:
    try:
        point, lines = ray.get(board.news.remote(), timeout=SOON_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        log.debug("no news of the run: %s", error)
        return
    for level, name, text in lines:
        logging.getLogger(name).log(level, "%s", text)
    if point is not None:
        watch(point)
