"""Training through Ray Train: the worker that jobs and searches share, and the wait for its end.

A worker reports only at checkpoints, since a report is a barrier across all workers and takes as
long as the controller's next poll. Ray hears of scores and addresses, and keeps no checkpoints: its
own book of them would list the ones that we prune, and then refuse to resume. What a run keeps is
in its storage, put there and read back by `mambaflow.training.checkpoint`; Ray's own files go to a
scratch folder. Every wait and every retry is bounded, except that an elastic run waits without
limit while it has fewer than min_workers.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import ray.train.torch
from torch import nn

from mambaflow.config import RunConfig, ScaleConfig, from_dict, to_dict
from mambaflow.data.shards import ShardError
from mambaflow.distributed.cluster import (
    SOON_S,
    answered,
    await_room,
    growth_s,
    loss_named,
    missing,
    worker_resources,
)
from mambaflow.distributed.progress import (
    ActorLogHandler,
    ControllerReporter,
    Report,
    last_line,
    start_progress_actor,
)
from mambaflow.host import share_threads
from mambaflow.models.weights import CheckpointError
from mambaflow.training.loop import Forward
from mambaflow.training.preflight import check_storage
from mambaflow.training.process_group import COLLECTIVE_TIMEOUT_S, ProcessGroup, Progress
from mambaflow.training.run import Outcome, RunFailed, train, train_and_score

# Times that workers may fail to start; Ray's own default is without limit.
CONTROLLER_FAILURES = 5
log = logging.getLogger(__name__)
Watch = Callable[[Progress], None]
Listen = Callable[[Report], None]


class RayProcessGroup(ProcessGroup):
    """The workers of Ray Train, as one of them sees them."""

    def __init__(self, watch: Watch) -> None:
        context = ray.train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
        super().__init__(rank, size, ray.train.torch.get_device(), watch)

    def wrap(self, objective: nn.Module) -> Forward:
        # TrainState has put the model on its device already.
        return ray.train.torch.prepare_model(objective, move_to_device=False)

    def report_checkpoint(self, scores: dict[str, float], uri: str) -> None:
        """Tell Ray of a checkpoint that is in place: others wait here for the first worker."""
        # Collective: every worker reports, though the first alone has saved. Numbers and an
        # address, and no Checkpoint, of which Ray would keep a book.
        ray.train.report({**scores, "checkpoint": uri})


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker of Ray Train runs: all of a run, as one of its process group.

    Args:
        settings: `run`, a configuration as `to_dict` gives it; `progress`, a progress actor;
            `score_test`, whether the test split is scored at the end; `owner`, see `train_on_ray`.
    """
    config, actor = from_dict(settings["run"]), settings["progress"]
    group = RayProcessGroup(actor.report_progress.remote)  # returns at once: no step waits
    group.owner = settings["owner"]
    share_threads(ray.train.get_context().get_local_world_size(), config.scale.threads)
    logging.getLogger("mambaflow").addHandler(ActorLogHandler(actor, group.rank))
    # On every node: one that does not share the folder would train on nothing that others see.
    check_storage(config)
    outcome = (train_and_score if settings["score_test"] else train)(config, group)
    # Ray hands the first worker's to the driver.
    return asdict(outcome)


def train_on_ray(
    config: RunConfig,
    watch: Watch,
    *,
    listen: Listen = lambda report: None,
    score_test: bool = True,
    owner: int = 0,
) -> Outcome:
    """Train through Ray Train on the connected cluster, and wait for the end.

    Args:
        watch: called about twice a second with the newest progress of the run.
        listen: called with what workers said at each checkpoint.
        score_test: whether the test split is scored at the end; a search does not look at it.
        owner: under which number the run's folder is owned (see `lease`).

    Raises:
        RunFailed: no room for the workers, they failed more often than max_failures, or the cluster
            is lost.
        ShardError, CheckpointError: workers found these damaged.
    """
    # Around all of it: even what an account is made of is asked of the cluster.
    with loss_named():
        return _trained(config, watch, listen, score_test, owner)


def _trained(
    config: RunConfig, watch: Watch, listen: Listen, score_test: bool, owner: int
) -> Outcome:
    # First, so that what is missing is said in our words, and waited for within bounds.
    await_room(config.scale)
    actor = start_progress_actor()
    settings = {
        "run": to_dict(config), "progress": actor, "score_test": score_test, "owner": owner,
    }  # fmt: skip
    # For Ray's own files, which it would otherwise leave in ~/ray_results.
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as scratch:
        trainer = _trainer(config, settings, scratch)
        try:
            # In the main thread `fit` would take Ctrl-C for itself, and abort the run without a
            # checkpoint.
            result = answered(trainer.fit, lambda: _show(actor, watch, listen))
        except ray.train.TrainingFailedError as error:
            raise _found_damage(error) or RunFailed(_account(error, config.scale)) from error
    return Outcome(**result.return_value)


def _trainer(config: RunConfig, settings: dict[str, Any], scratch: str) -> Any:
    scale = config.scale
    workers = scale.num_workers if not scale.min_workers else (scale.min_workers, scale.num_workers)
    api: Any = ray.train  # Ray's type hints are those of Train V1, and V2 is what runs
    return api.torch.TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=api.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=api.ScalingConfig(
            num_workers=workers,  # a pair, fewest and most, makes the run elastic
            use_gpu=scale.use_gpu,
            resources_per_worker=worker_resources(scale),
            elastic_resize_monitor_interval_s=growth_s(),
        ),
        run_config=api.RunConfig(
            # Of Ray's own files, in scratch. Not the run's, which may hold what Ray does not take.
            name="run",
            storage_path=scratch,
            failure_config=api.FailureConfig(
                max_failures=scale.max_failures,
                # A lost node costs one of each where its place is waited for in vain.
                controller_failure_limit=CONTROLLER_FAILURES + scale.max_failures,
            ),
            callbacks=[ControllerReporter(settings["progress"])],
            logging_config=api.LoggingConfig("WARNING"),
        ),
    )


def _found_damage(error: ray.train.TrainingFailedError) -> ValueError | None:
    """The damaged shard or checkpoint for which workers failed, if that is why."""
    # A WorkerGroupError has what its workers raised, by rank; a ControllerError has none. Ray may
    # have wrapped an exception to keep its traceback.
    for cause in getattr(error, "worker_failures", {}).values():
        found = getattr(cause, "_base_exc", cause)
        if isinstance(found, ShardError | CheckpointError):
            return found
    return None


def _account(error: ray.train.TrainingFailedError, scale: ScaleConfig) -> str:
    """Why a run ended without a result."""
    if isinstance(error, ray.train.WorkerGroupError):
        # The lowest rank: none is there twice, so that no two exceptions are compared.
        rank, cause = min(error.worker_failures.items())
        times = scale.max_failures + 1  # that many were made good, and one more
        return f"workers failed {times} times (max_failures={scale.max_failures}); " + (
            f"the last time worker {rank}: {last_line(cause)}"
        )
    # No worker failed: most likely there are too few nodes left to start them on.
    return missing(scale) or last_line(error)


def _show(actor: Any, watch: Watch, listen: Listen) -> None:
    try:
        progress, lines, reports = ray.get(actor.news.remote(), timeout=SOON_S)
    # A look that fails is no reason to end a run: the next one tells the same.
    except (ray.exceptions.RayError, TimeoutError) as error:
        log.debug("no news of the run: %s", error)
        return
    for level, name, text in lines:
        logging.getLogger(name).log(level, "%s", text)  # never as the format: it may hold a %
    for report in reports:
        listen(report)
    if progress is not None:
        watch(progress)
