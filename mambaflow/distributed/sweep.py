"""A sweep on Ray Tune: its trials as actors, which train themselves or lead workers of Ray Train.

Tune starts actors and hands round what they say; what it knows besides is thrown away with its
folder. The ledger is what a sweep goes on from: a new Tuner gets the trials that are not ended, and
rungs that have heard all reports again. Tune's own restore is not used. In Ray 2.60 its ASHA
forgets its rungs, its Optuna is told that a stopped trial is complete, its snapshot lags behind,
and counts of reports begin anew.

A trial of one worker is trained by its actor, with the core or GPU that Tune gave it. One of more
holds none: its workers ask for theirs in a placement group of their own, which Tune knows nothing
of, so that as many trials run as the cluster has room for workers. Either is asked to end by the
file STOP, and saves: an actor that were killed would leave its workers, and their place, to a
cleaner that Ray may have lost. Actors go on to the next trial, since a new one would import for
longer than a small trial trains.
"""

import contextlib
import logging
import queue
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import ray
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mambaflow.config import RunConfig, ScaleConfig, from_dict, from_json, to_dict
from mambaflow.data.shard_reader import ShardSet
from mambaflow.distributed.cluster import answered, loss_named, worker_resources
from mambaflow.distributed.progress import Report, last_line
from mambaflow.distributed.train import Listen, train_on_ray
from mambaflow.host import share_threads
from mambaflow.lease import owning
from mambaflow.report.run_log import StoredRunLog, logged
from mambaflow.run_paths import RunPaths
from mambaflow.search.board import METRIC
from mambaflow.search.budget import timed_steps, with_steps
from mambaflow.search.conductor import STOP, Conductor, Told
from mambaflow.search.config import SearchConfig
from mambaflow.search.ledger import ReplacedError
from mambaflow.training.preflight import open_run
from mambaflow.training.process_group import ProcessGroup
from mambaflow.training.run import Outcome, RunFailed, train
from mambaflow.variables import state

# Seconds that a trial has to save and to let its workers go; then its actor is killed.
STOPPING_S = 300
# Times that a trial whose actor was lost is begun anew, from its newest checkpoint.
RESTARTS = 3
# On every cluster, and once: a share of it places the actors on the head, and takes no core.
HEAD = {"node:__internal_head__": 0.001}
# In a trial's folder, where it failed.
FAILURE = "failure.txt"
log = logging.getLogger(__name__)


class Asha:
    """Asynchronous successive halving (Li et al. 2020, 1810.05934), as Ray has it, with trials
    under the names of the ledger.

    Args:
        search: its rungs are at `grace` validations, and `reduction_factor` times as many each.
    """

    def __init__(self, search: SearchConfig) -> None:
        # One bracket: of several, Ray would draw a trial's by chance.
        self._asha: Any = ASHAScheduler(
            time_attr="validations", metric="psnr", mode="max", max_t=search.validations,
            grace_period=search.grace, reduction_factor=search.reduction_factor, brackets=1,
        )  # fmt: skip
        self._known: dict[str, Any] = {}

    def decide(self, trial: str, validations: float, psnr: float) -> str:
        """As `search.conductor.Rungs`."""
        if trial not in self._known:
            # All that it looks at of a trial.
            self._known[trial] = type("Named", (), {"trial_id": trial})()
            self._asha.on_trial_add(None, self._known[trial])
        said = {"validations": validations, "psnr": psnr}
        decision = self._asha.on_trial_result(None, self._known[trial], said)
        return "stop" if decision == TrialScheduler.STOP else "continue"


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
            self._told.put(Told(self._run.run_name, ended="failed", cause=_cause(error)))

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
            # The data may have been moved since.
            data, found = self._run.data, self._run.data_hash
            run = replace(before, resume=True, data=data, data_hash=found)
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


def _cause(error: BaseException) -> str:
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


class _Shared:
    """The conductor, in objects that Tune copies and pickles: a copy of it is itself."""

    here: ClassVar[dict[int, "_Shared"]] = {}

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor
        _Shared.here[id(conductor)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process there is no conductor to find, and nobody who asks it.
        return _Shared.here.get, (id(self.conductor),)


class _Searcher(Searcher):
    """Gives Tune the conductor's trials, as many at once as there is room for."""

    def __init__(self, shared: _Shared, concurrent: int) -> None:
        super().__init__(metric="psnr", mode="max")
        self.shared, self.concurrent = shared, concurrent
        self.live: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """A trial to begin; None while there is no room, or nothing to begin yet."""
        if len(self.live) >= self.concurrent:
            return None
        conductor = self.shared.conductor
        conductor.poll()
        trial = conductor.next_trial()
        if trial is None:
            # While others run more may be asked for.
            return None if self.live else Searcher.FINISHED
        self.live[trial_id] = trial.name
        conductor.started(trial.name)
        return {
            "trial": trial.name,
            "run": to_dict(conductor.run_of(trial)),
            "search": conductor.sweep.search,
            "known": trial.last.step if trial.last else 0,
            "chosen": trial.values | {"parameters": trial.parameters, "flops": trial.flops},
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """There is room for another."""
        self.live.pop(trial_id, None)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The conductor has heard of it by the scheduler."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Scheduler(FIFOScheduler):
    """Asks the conductor what a report means."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__()
        self.shared = shared

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        decision = self.shared.conductor.heard(result["told"])
        return TrialScheduler.STOP if decision == STOP else TrialScheduler.CONTINUE


class _Callback(ray.tune.Callback):
    """Tells the conductor of ends, and gives it time to look for requests."""

    def __init__(self, shared: _Shared) -> None:
        self.shared = shared

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called several times a second."""
        self.shared.conductor.poll()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The actor has said that its run is over, or was told to stop."""
        told = (trial.last_result or {}).get("told")
        if told is not None and told.ended:
            self.shared.conductor.heard_end(told)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The actor is lost, more often than it is begun anew."""
        error = trial.get_error()  # None where Tune could not keep it
        cause = _cause(error or RuntimeError("its actor was lost"))
        self.shared.conductor.ended(trial.config["trial"], "failed", cause)


def concurrency(search: SearchConfig, scale: ScaleConfig) -> int:
    """Trials at once: as many as asked for, or as the connected cluster has room for."""
    have = ray.cluster_resources()
    needs = {kind: amount * scale.num_workers for kind, amount in worker_resources(scale).items()}
    room = min(int(have.get(kind, 0) // amount) for kind, amount in needs.items())
    return max(1, min(room, search.max_concurrent or room))


def threads_of(scale: ScaleConfig, concurrent: int) -> int:
    """Threads of each worker of a trial on CPU: its share of the cluster's cores."""
    if scale.use_gpu or scale.threads:
        return scale.threads
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // (concurrent * scale.num_workers))


def run_on_tune(conductor: Conductor, concurrent: int, watch: Callable[[], None]) -> None:
    """Run the conductor's trials, and wait for the end of the last.

    Args:
        concurrent: trials at once.
        watch: called about twice a second, in the thread that calls this.

    Raises:
        ReplacedError: another driver has taken the sweep over.
    """
    # No files of each trial beside our own, and no table beside ours.
    state("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # What trials say is a word of our own, without the metric under its name.
    state("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    state("TUNE_FORCE_TRIAL_CLEANUP_S", str(2 * STOPPING_S))
    # The newer output prints a table even where none is asked for.
    state("RAY_AIR_NEW_OUTPUT", "0")
    # It misses the files that were left out above.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scale = conductor.sweep.run.scale
    place = worker_resources(scale) if scale.num_workers == 1 else HEAD
    shared = _Shared(conductor)
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as scratch:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(TrialActor, ray.tune.PlacementGroupFactory([place])),
            tune_config=ray.tune.TuneConfig(
                trial_name_creator=_name, trial_dirname_creator=_name,
                metric="psnr", mode="max", num_samples=-1, reuse_actors=True,
                search_alg=_Searcher(shared, concurrent), scheduler=_Scheduler(shared),
            ),
            run_config=ray.tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, callbacks=[_Callback(shared)],
                failure_config=ray.tune.FailureConfig(max_failures=RESTARTS),
                # Runs save for themselves, and where Tune knows nothing of.
                checkpoint_config=ray.tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
            ),
        )  # fmt: skip
        with loss_named():
            _watched(tuner, watch)


def _name(trial: Any) -> str:
    # Tune's own holds every value of the configuration.
    return str(trial.config["trial"])


def _watched(tuner: Any, watch: Callable[[], None]) -> None:
    try:
        # In the main thread Tune would take the signals for itself.
        answered(tuner.fit, watch)
    except ray.tune.TuneError as error:
        raise _replaced(error) or RunFailed(f"Ray Tune failed: {last_line(error)}") from error


def _replaced(error: BaseException | None) -> ReplacedError | None:
    """What a conductor raised because of another driver, in what Tune made of it."""
    while error is not None and not isinstance(error, ReplacedError):
        error = error.__cause__ or error.__context__
    return error
