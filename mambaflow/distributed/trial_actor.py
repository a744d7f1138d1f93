"""A trial of a sweep as an actor of Ray Tune, which trains it or leads workers of Ray Train.

A trial of one worker is trained by its actor, with the core or GPU that Tune gave it. One of more
holds none: its workers ask for theirs in a placement group of their own, which Tune knows nothing
of, so that as many trials run as the cluster has room for workers. Either is asked to end by the
file STOP, and saves: an actor that were killed would leave its workers, and their place, to a
cleaner that Ray may have lost. Actors go on to the next trial, since a new one would import for
longer than a small trial trains.
"""

import contextlib
import queue
import threading
import traceback
from dataclasses import replace
from typing import Any

import ray
import ray.tune
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mambaflow.config import RunConfig, ScaleConfig, from_dict, from_json, to_dict
from mambaflow.data.shard_reader import ShardSet
from mambaflow.distributed.cluster import worker_resources
from mambaflow.distributed.progress import Report, last_line
from mambaflow.distributed.train import Listen, train_on_ray
from mambaflow.host import share_threads
from mambaflow.lease import owning
from mambaflow.report.run_log import StoredRunLog, logged
from mambaflow.run_paths import RunPaths
from mambaflow.search.board import METRIC
from mambaflow.search.budget import timed_steps, with_steps
from mambaflow.search.conductor import Told
from mambaflow.search.config import SearchConfig
from mambaflow.training.preflight import open_run, require_same_run
from mambaflow.training.process_group import ProcessGroup
from mambaflow.training.run import Outcome, train

# Seconds that a trial has to save and to let its workers go; then its actor is killed.
STOPPING_S = 300
# In a trial's folder, where it failed.
FAILURE = "failure.txt"


class TrialGroup(ProcessGroup):
    """A trial's only worker, which tells of its checkpoints."""

    def __init__(self, scale: ScaleConfig, listen: Listen) -> None:
        super().__init__(0, 1, torch.device("cuda" if scale.use_gpu else "cpu"))
        self.listen = listen

    def report_checkpoint(self, scores: dict[str, float], uri: str) -> None:
        self.listen(scores)


class TrialActor(ray.tune.Trainable):
    """One trial after another. A step lasts until a run has come to its next checkpoint, or
    ended."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin to train, or go on from the newest checkpoint, in a thread.

        Args:
            config: `run`, as `to_dict` gives it; `search`, a SearchConfig; `known`, the step of
                the newest report that the driver has; `chosen`, what the trial is of the space.
        """
        self._told: queue.Queue[Told] = queue.Queue()
        self._run, self._search = from_dict(config["run"]), config["search"]
        self._known, self._chosen = config["known"], config["chosen"]
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on to another trial; False where the last one does not end."""
        # Tune calls no cleanup in between.
        self.cleanup()
        if self._thread.is_alive():
            return False
        self.setup(new_config)
        return True

    def _train(self) -> None:
        try:
            # The actor of a driver that was lost may live on for a while.
            folder = RunPaths.of(self._run).folder
            with owning(folder, f"trial {self._run.run_name}") as owner:
                outcome = self._carried_out(owner)
            ended = "failed" if outcome.failed else outcome.status
            self._told.put(Told(self._run.run_name, ended=ended, cause=outcome.cause))
        # Whatever it is, the sweep goes on, and the ledger has the cause.
        except Exception as error:
            # The whole of it beside the run: a line is not enough to mend it.
            folder = RunPaths.of(self._run).folder
            # Where that cannot be kept either, the end must still be told.
            with contextlib.suppress(OSError):
                folder.write(FAILURE, traceback.format_exc().encode())
            self._told.put(Told(self._run.run_name, ended="failed", cause=cause_of(error)))

    def _carried_out(self, owner: int) -> Outcome:
        run = self._opened()
        # What the driver did not hear before it, or this actor, was lost.
        self._tell_what_is_logged(run)
        outcome = self._trained(run, owner)
        # Nothing is written where the folder is another's, or the disk full.
        if outcome.status not in ("lost", "full"):
            self._tell_what_is_logged(run)
            self._log_settings(run)
        return outcome

    def _trained(self, run: RunConfig, owner: int) -> Outcome:
        def listen(report: Report) -> None:
            self._tell(run, report)

        if run.scale.num_workers > 1:
            return train_on_ray(
                run, lambda progress: None, listen=listen, score_test=False, owner=owner
            )
        share_threads(1, run.scale.threads)
        group = TrialGroup(run.scale, listen)
        group.owner = owner
        return train(run, group)

    def _opened(self) -> RunConfig:
        """The run, with its folder; one that is there goes on as it was begun."""
        folder = RunPaths.of(self._run).folder
        if folder.exists(RunPaths.CONFIG):
            before = from_json(folder.read(RunPaths.CONFIG))
            require_same_run(self._run, before)
            # The data may have been moved since, and so may the sweep: another one may be where it
            # was.
            moved = {n: getattr(self._run, n) for n in ("data", "data_hash", "storage", "run_name")}
            run = replace(before, resume=True, **moved)
        else:
            run = self._timed()
        open_run(run)
        return run

    def _timed(self) -> RunConfig:
        """The run with its steps, where a budget in seconds leaves it to the machine."""
        if self._search.budget != "seconds":
            return self._run
        if self._run.scale.num_workers == 1:
            return _measured(to_dict(self._run), self._search)
        # As its workers will compute, on a node with room for one: outside of the placement group
        # of this trial, which its children would else share, and which holds no CPU.
        # Ray documents None, and its annotation lacks it.
        outside = PlacementGroupSchedulingStrategy(None)  # type: ignore[arg-type]
        options = _as_options(self._run.scale)
        remote = ray.remote(_measured).options(scheduling_strategy=outside, **options)
        return ray.get(remote.remote(to_dict(self._run), self._search))

    def _tell(self, run: RunConfig, report: Report) -> None:
        scores = {name: x for name, x in report.items() if name.startswith("val/")}
        step = int(report["step"])
        # A run that is stopped between two validations saves, and has no scores to tell.
        if not scores or step <= self._known:
            return
        self._known = step
        self._told.put(
            Told(run.run_name, step, run.train.max_steps, report.get("seconds", 0.0), scores)
        )

    def _tell_what_is_logged(self, run: RunConfig) -> None:
        for line in logged(RunPaths.of(run).folder):
            if METRIC in line:
                self._tell(run, line)

    def _log_settings(self, run: RunConfig) -> None:
        """What was chosen beside what came of it, for TensorBoard's table of settings."""
        folder = RunPaths.of(run).folder
        if not any(METRIC in line for line in logged(folder)):
            return
        run_log = StoredRunLog(folder, self._known)
        try:
            run_log.hparams(self._chosen, [METRIC])
        finally:
            run_log.close()

    def step(self) -> dict[str, Any]:
        """What the run says next."""
        told = self._told.get()
        return {"told": told, "done": bool(told.ended)}

    def cleanup(self) -> None:
        """Have the run save and let its workers go, if it has not ended."""
        folder = RunPaths.of(self._run).folder
        if self._thread.is_alive() and folder.exists(RunPaths.CONFIG):
            folder.write(RunPaths.STOP, b"the trial is stopped\n")
        self._thread.join(STOPPING_S)


def cause_of(error: BaseException) -> str:
    """An error in a line, with its kind."""
    kind, line = type(error).__name__, last_line(error)
    return line if kind in line else f"{kind}: {line}"


def _measured(run: dict[str, Any], search: SearchConfig) -> RunConfig:
    """A run with as many steps as fit into its minutes on this node."""
    config = from_dict(run)
    share_threads(1, config.scale.threads)
    device = torch.device("cuda" if config.scale.use_gpu else "cpu")
    steps = timed_steps(config, search.trial_minutes, device)
    with contextlib.closing(ShardSet(config.data, "train")) as shards:
        return with_steps(config, steps, search, len(shards))


def _as_options(scale: ScaleConfig) -> dict[str, float]:
    names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    return {names[kind]: amount for kind, amount in worker_resources(scale).items()}
