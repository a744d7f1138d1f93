"""The one room that imports Ray: a cluster to work on, and training on it.

Ray's own defaults are replaced where they are known to hurt: authentication is stated, never
guessed; every retry is bounded; a worker reports only at checkpoints, since a report is a
barrier across all workers and takes as long as the controller's next poll.
"""

import contextlib
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any


def _settle_authentication() -> None:
    """State Ray's authentication before it is imported, which is when it reads it.

    Without a cluster to join we shall start our own: it asks for a token that only this process
    and its children know, so that nobody else on the machine can run code in it. A cluster that
    exists has its own mode, which its users state in RAY_AUTH_MODE.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


_settle_authentication()

import ray  # noqa: E402
import ray.train  # noqa: E402
import ray.train.torch  # noqa: E402
import torch  # noqa: E402
from ray.train import (  # noqa: E402
    Checkpoint,
    CheckpointUploadMode,
    FailureConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402

from mambaflow.config import RunConfig, from_dict, to_dict  # noqa: E402
from mambaflow.run import Outcome, Point, World, train  # noqa: E402
from mambaflow.storage import at  # noqa: E402
from mambaflow.training import Forward  # noqa: E402

COLLECTIVE_TIMEOUT_S = 600
CONTROLLER_FAILURES = 5
POLL_S = "0.5"
log = logging.getLogger(__name__)

# The environment that workers need as the driver has it, whichever node they start on.
FORWARDED = ("AWS_", "MAMBAFLOW_", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "RAY_TRAIN_")


@contextlib.contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """The cluster at RAY_ADDRESS, or else a private one on this machine that ends with us."""
    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS", "local")}
        if settings["address"] == "local":
            # A short path: a Unix socket's name holds 107 bytes.
            folder = tempfile.TemporaryDirectory(
                prefix="mf-", dir="/tmp", ignore_cleanup_errors=True
            )
            settings |= {
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "_temp_dir": stack.enter_context(folder),
            }
        ray.init(logging_level=logging.WARNING, runtime_env=_environment(), **settings)
        stack.callback(ray.shutdown)
        yield


def _environment() -> dict[str, Any]:
    """What workers need of the driver's environment, whichever node they start on."""
    given = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED)}
    given.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # prints each line twice otherwise
    given.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    return {"env_vars": given}


@ray.remote(num_cpus=0)
class Board:
    """Where the first worker pins its newest point, for the driver's progress bar."""

    def __init__(self) -> None:
        self.point: Point | None = None

    def pin(self, point: Point) -> None:
        """Replace the point."""
        self.point = point

    def read(self) -> Point | None:
        """The newest point."""
        return self.point


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
        """Tell Ray of a checkpoint that is already in place: a barrier of all workers."""
        checkpoint = Checkpoint(uri) if self.rank == 0 else None
        ray.train.report(
            scores,
            checkpoint=checkpoint,
            checkpoint_dir_name=uri.rsplit("/", 1)[1],
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def pin(self, point: Point) -> None:
        self.board.pin.remote(point)


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs: the job of training, in Ray's world."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    outcome = train(from_dict(settings["run"]), RayWorld(settings["board"]))
    return {"status": outcome.status, "step": outcome.step}


def train_on_ray(config: RunConfig, watch: Callable[[Point], None]) -> Outcome:
    """Train through Ray Train on the connected cluster, and wait for the end.

    Args:
        watch: called about twice a second with the newest point of the run.

    Raises:
        ray.train.TrainingFailedError: workers failed more often than max_failures.
    """
    scale = config.scale
    workers = scale.num_workers if not scale.min_workers else (scale.min_workers, scale.num_workers)
    board = Board.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        work,
        train_loop_config={"run": to_dict(config), "board": board},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=scale.use_gpu),
        run_config=ray.train.RunConfig(
            name=config.run_name,
            storage_path=at(config.storage).uri,
            failure_config=FailureConfig(
                max_failures=scale.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
        ),
    )
    with _watching(board, watch):
        result = trainer.fit()
    return Outcome(**result.return_value)


@contextlib.contextmanager
def _watching(board: Any, watch: Callable[[Point], None]) -> Iterator[None]:
    done = threading.Event()

    def look() -> None:
        seen = None
        while not done.wait(0.5):
            try:
                point = ray.get(board.read.remote(), timeout=5)
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.debug("no news of the run: %s", error)
                continue
            if point is not None and point != seen:
                seen = point
                watch(point)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
