"""A sweep on Ray Tune: its trials as actors (see `trial_actor`), and Tune among them.

Tune starts actors and hands round what they say; what it knows besides is thrown away with its
folder. The ledger is what a sweep goes on from: a new Tuner gets the trials that are not ended, and
rungs that have heard all reports again. Tune's own restore is not used. In Ray 2.60 its ASHA
forgets its rungs, its Optuna is told that a stopped trial is complete, its snapshot lags behind,
and counts of reports begin anew.
"""

import logging
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

import ray
import ray.tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mambaflow.config import ScaleConfig, to_dict
from mambaflow.distributed.cluster import answered, loss_named, worker_resources
from mambaflow.distributed.progress import last_line
from mambaflow.distributed.trial_actor import STOPPING_S, TrialActor, cause_of
from mambaflow.search.conductor import STOP, Conductor
from mambaflow.search.config import SearchConfig
from mambaflow.search.ledger import ReplacedError
from mambaflow.training.run import RunFailed
from mambaflow.variables import state

# Times that a trial whose actor was lost is begun anew, from its newest checkpoint.
RESTARTS = 3
# On every cluster, and once: a share of it places the actors on the head, and takes no core.
HEAD = {"node:__internal_head__": 0.001}


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
        cause = cause_of(error or RuntimeError("its actor was lost"))
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
