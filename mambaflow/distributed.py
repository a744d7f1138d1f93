"""The one room that imports Ray: a cluster to work on, and training on it.

Ray's own defaults are replaced where they are known to hurt: authentication is stated, never
guessed; every wait and every retry is bounded, except that an elastic run waits without limit
while it has fewer than min_workers; a worker reports only at checkpoints, since a report is a
barrier across all workers and takes as long as the controller's next poll.

Ray hears of scores and addresses, and keeps no checkpoints: its own book of them would list the
ones that we prune, and then refuse to resume. What a run keeps is in its storage, put there and
read back by `mambaflow.checkpoint`; Ray's own files go to a scratch folder.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

LOCAL = "local"


def cluster_address() -> str:
    """Where RAY_ADDRESS points: host:port or auto; "local", a private cluster, without it.

    Raises:
        ValueError: it is the address of jobs, or of a Ray client.
    """
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    if "://" in address:
        raise ValueError(
            f"RAY_ADDRESS (={address}) is where jobs are submitted; use `ray job submit -- python "
            "…`, or set RAY_ADDRESS to the head's host:port (6379 by default), or unset it for a "
            "private Ray on this machine"
        )
    return address


def _settle_authentication() -> None:
    """State Ray's authentication before it is imported, which is when it reads it.

    Without a cluster to join we shall start our own: it asks for a token that only this process
    and its children know, so that nobody else on the machine can run code in it, and no token is
    written to the home folder. A cluster that exists has its own mode, which its users state in
    RAY_AUTH_MODE; a job of the cluster inherits it.
    """
    joining = os.environ.get("RAY_ADDRESS", LOCAL) not in ("", LOCAL)
    if not joining and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


_settle_authentication()

import ray  # noqa: E402
import ray.train  # noqa: E402
import ray.train.torch  # noqa: E402
import torch  # noqa: E402
from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from mambaflow.checkpoint import CheckpointError  # noqa: E402
from mambaflow.config import RunConfig, ScaleConfig, from_dict, require, to_dict  # noqa: E402
from mambaflow.process import KEEP_MEMORY, share_cores  # noqa: E402
from mambaflow.run import Outcome, RunFailed, check_storage, train  # noqa: E402
from mambaflow.shards import ShardError  # noqa: E402
from mambaflow.training import Forward  # noqa: E402
from mambaflow.world import Point, World  # noqa: E402

REACH_S = 10
COLLECTIVE_TIMEOUT_S = 600
CONTROLLER_FAILURES = 5
PATIENCE_S, SOON_S = 300.0, 5.0
WATCH_S = 0.5
GROWTH_S = 60.0
log = logging.getLogger(__name__)

# What a worker needs of the driver's environment, whichever node it starts on.
FORWARDED = ("AWS_", "MAMBAFLOW_", "RAY_TRAIN_", "RAY_ADDRESS")

# How Ray Train and its workers behave unless the environment says otherwise.
SETTINGS = {
    **KEEP_MEMORY,
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next one
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints each line twice otherwise
}


@contextlib.contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """The cluster at RAY_ADDRESS, or else a private one on this machine that ends with us.

    Args:
        num_cpus: cores of the private cluster; without it, all that this machine has.

    Raises:
        ValueError, OSError: RAY_ADDRESS is of another kind, does not answer, or refuses us.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address()
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"address": address}
        if address == LOCAL:
            # A short path: a Unix socket's name holds 107 bytes.
            folder = tempfile.TemporaryDirectory("", "mf-", "/tmp", ignore_cleanup_errors=True)
            temp = stack.enter_context(folder)
            settings |= {"num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": temp}
        _join(settings, {"env_vars": _environment(address)})
        stack.callback(ray.shutdown)
        yield


def _join(settings: dict[str, Any], runtime_env: dict[str, Any]) -> None:
    """ray.init; an address where nobody answers is found in seconds, where Ray takes minutes."""
    address = settings["address"]
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS (={address}): {error}; start one with "
            "`ray start --head`, or unset it for a private Ray on this machine"
        ) from error
    try:
        ray.init(
            logging_level=logging.WARNING, log_to_driver=False, runtime_env=runtime_env, **settings
        )
    except (ray.exceptions.AuthenticationError, ConnectionError) as error:
        raise ConnectionError(
            f"Ray at RAY_ADDRESS (={address}) does not let us in: {error}; start it with `ray "
            "start --head`, and set RAY_AUTH_MODE, and RAY_AUTH_TOKEN_PATH for token, as there"
        ) from error


def _environment(address: str) -> dict[str, str]:
    """What workers get of the driver's environment, less what they have of their job: Ray refuses
    a variable that is given twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    known = job.get("runtime_env", {}).get("env_vars", {})
    given = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED) or k in SETTINGS}
    if address in (LOCAL, "auto"):
        given.pop("RAY_ADDRESS", None)
    return {k: v for k, v in (SETTINGS | given).items() if k not in known}


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


class Board:
    """Where workers pin the newest point of a run and what they log, for the driver to show."""

    def __init__(self) -> None:
        self.point: Point | None = None
        self.lines: list[tuple[int, str, str]] = []

    def pin(self, point: Point) -> None:
        """Replace the point."""
        self.point = point

    def say(self, level: int, name: str, text: str) -> None:
        """Add a line of a log."""
        self.lines.append((level, name, text))

    def news(self) -> tuple[Point | None, list[tuple[int, str, str]]]:
        """The newest point, and the lines since the last call."""
        lines, self.lines = self.lines, []
        return self.point, lines


def _board() -> Any:
    """A board on the driver's own node, so that it lives as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


class Told(logging.Handler):
    """A worker's log, told to the board: the first worker's whole, of others the warnings."""

    def __init__(self, board: Any, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self.board, self.rank = board, rank

    def emit(self, record: logging.LogRecord) -> None:
        text = f"[worker {self.rank}] {self.format(record)}"
        self.board.say.remote(record.levelno, record.name, text)


class Failures(ray.train.UserCallback):
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


class RayWorld(World):
    """One worker of Ray Train."""

    def __init__(self, board: Any) -> None:
        context = ray.train.get_context()
        super().__init__(
            context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
        )
        self.board = board

    def wrap(self, model: torch.nn.Module) -> Forward:
        return ray.train.torch.prepare_model(model, move_to_device=False)

    def reported(self, scores: dict[str, float], uri: str) -> None:
        """Tell Ray of a checkpoint that is in place: others wait here for the first worker."""
        ray.train.report({**scores, "checkpoint": uri})

    def pin(self, point: Point) -> None:
        self.board.pin.remote(point)


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs: the job of training, in Ray's world."""
    config, world = from_dict(settings["run"]), RayWorld(settings["board"])
    share_cores(ray.train.get_context().get_local_world_size())
    told = Told(world.board, world.rank)
    logging.getLogger("mambaflow").addHandler(told)
    check_storage(config)
    outcome = train(config, world)
    return {"status": outcome.status, "step": outcome.step}


def train_on_ray(config: RunConfig, watch: Callable[[Point], None]) -> Outcome:
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
            callbacks=[Failures(board)],
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


def _watched(fit: Callable[[], Any], board: Any, watch: Callable[[Point], None]) -> Any:
    """Run `fit` in a thread, while this one, which is where signals arrive, shows the news."""
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(fit)
        while not wait([ending], timeout=WATCH_S).done:
            _show(board, watch)
        _show(board, watch)
        return ending.result()


def _show(board: Any, watch: Callable[[Point], None]) -> None:
    try:
        point, lines = ray.get(board.news.remote(), timeout=SOON_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        log.debug("no news of the run: %s", error)
        return
    for level, name, text in lines:
        logging.getLogger(name).log(level, "%s", text)
    if point is not None:
        watch(point)
