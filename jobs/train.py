"""Train V1 or V2 from staged shards, on Ray or without it.

    python jobs/train.py --arch v2                      a private Ray on this machine
    ray job submit -- python jobs/train.py --arch v2    the cluster at RAY_ADDRESS
    torchrun --nproc-per-node 8 jobs/train.py --no-ray --use-gpu --num-workers 8

Exit codes: 0 done; 1 failed; 2 bad input, nothing changed; 3 a shard or all checkpoints were
found damaged on the way: mend them, then go on with --resume; 143 stopped on request (SIGTERM,
Ctrl-C on Ray, or a file named STOP in the run's folder) with a checkpoint saved: go on with
--resume. `ray job stop` grants 3 s before it kills; for a large model submit the job with
--runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}'.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from mambaflow.checks import lookup, require
from mambaflow.config import RECIPES, RunConfig
from mambaflow.data.shards import ShardError
from mambaflow.data.sources import EMBEDDED
from mambaflow.data.staging import stage_once
from mambaflow.host import keep_memory, share_threads
from mambaflow.kernels.build import NativeError, compiler
from mambaflow.models.weights import CheckpointError
from mambaflow.storage import Storage, at
from mambaflow.training.process_group import ProcessGroup, RunProgress
from mambaflow.training.run import Outcome, RunFailed, check_data, open_run, train
from mambaflow.training.stop_signal import STOP

FAILED, BAD_INPUT, DAMAGED, STOPPED = 1, 2, 3, 128 + signal.SIGTERM
log = logging.getLogger(__name__)


def parse(argv: list[str]) -> RunConfig:
    """The run that the flags describe; --arch and --recipe choose the defaults of the others."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--arch", default="v2")
    first.add_argument("--recipe", default="mission")
    chosen, _ = first.parse_known_args(argv)
    return tyro.cli(
        RunConfig,
        args=argv,
        default=lookup(RECIPES, chosen.recipe, "recipe")(chosen.arch),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def prepare(config: RunConfig) -> RunConfig:
    """The same run with a name, absolute addresses, and its data staged."""
    torchrun = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        config.scale.ray or config.scale.num_workers == torchrun,
        f"num_workers (={config.scale.num_workers}) without Ray must be the number of processes "
        f"(={torchrun}); start them with torchrun --nproc-per-node {config.scale.num_workers}",
    )
    require(
        config.scale.ray or not config.scale.use_gpu or torch.cuda.is_available(),
        "use_gpu (=True) needs a CUDA device, and torch sees none here; use --no-use-gpu",
    )
    if config.scale.compile != "off" and not (config.scale.ray and os.environ.get("RAY_ADDRESS")):
        _require_compiler(config.scale.compile)
    warn_of_a_copy(config.storage)
    name = config.run_name or f"{config.arch}-{time.strftime('%Y%m%d-%H%M%S')}"
    data = stage_once(config.data) if config.data in EMBEDDED else config.data
    return replace(
        config,
        run_name=name,
        storage=at(config.storage).uri,
        data=at(data).uri,
        command=" ".join(["python", *sys.argv]),
    )


def _require_compiler(how: str) -> None:
    try:
        compiler()
    except NativeError as error:
        raise ValueError(
            f"compile (={how!r}) needs a compiler: {error}; or --compile off"
        ) from error


def warn_of_a_copy(storage: str) -> None:
    """Say so if a job of Ray would keep its run in the copy of --working-dir that it runs in."""
    copied = "working_dir" in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if copied and not re.match(r"/|~|\w+://", storage):
        log.warning(
            "storage (=%s) is in Ray's copy of --working-dir, which Ray removes in time; "
            "use an absolute path that the nodes share, or s3://…",
            storage,
        )


@contextlib.contextmanager
def stoppable(run: Storage) -> Iterator[None]:
    """SIGTERM or Ctrl-C asks the run to stop; a second one ends the driver at once."""

    def ask(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        log.info("stopping with a checkpoint; the same once more ends this at once")
        run.write(STOP, signal.Signals(number).name.encode() + b"\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[RunProgress], None]]:
    """A bar that shows the newest point of the run."""
    with tqdm(unit="step", dynamic_ncols=True, disable=None) as bar:

        def watch(point: RunProgress) -> None:
            bar.total, bar.n = point.steps, point.step
            bar.set_postfix_str(f"loss {point.loss:.4f}, {point.samples_per_second:.0f} samples/s")

        yield watch


def on_ray(config: RunConfig, run: Storage) -> Outcome:
    """Train on the connected or a private cluster."""
    from mambaflow.distributed.train import train_on_ray

    with stoppable(run), progress_bar() as watch:
        return train_on_ray(config, watch)


@contextlib.contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """The Ray to train on, if the run wants one: at RAY_ADDRESS, or private to this run."""
    if not config.scale.ray:
        yield
        return
    from mambaflow.distributed.cluster import connect
    from mambaflow.distributed.train import check_room

    with connect(config.scale.num_workers + 1):
        check_room(config.scale)
        yield


class TorchrunProcessGroup(ProcessGroup):
    """This process, alone or among torchrun's."""

    def __init__(self, use_gpu: bool, watch: Callable[[RunProgress], None]) -> None:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else None
        if device is not None:
            torch.cuda.set_device(device)
        share_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        keep_memory()
        if size > 1:
            dist.init_process_group("nccl" if use_gpu else "gloo")
        super().__init__(rank, size, device or torch.device("cpu"))
        self.watch = watch

    def report_progress(self, point: RunProgress) -> None:
        self.watch(point)


def without_ray(config: RunConfig) -> Outcome:
    """Train in this process; a bare GPU box needs no Ray."""
    with progress_bar() as watch:
        outcome = train(config, TorchrunProcessGroup(config.scale.use_gpu, watch))
    if dist.is_initialized():
        dist.destroy_process_group()
    return outcome


def show(config: RunConfig, run: Storage) -> None:
    """The end of a run, for a person."""
    print(run.read("report/table.md").decode())
    print(f"run folder   {run.uri}")
    print(f"picture      {run.uri}/report/picture.png")
    print(f"TensorBoard  tensorboard --logdir {config.storage}")


def main(argv: list[str] | None = None) -> int:
    """Parse, check, train, show; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where keys were found
    with contextlib.ExitStack() as stack:
        try:
            config = prepare(parse(sys.argv[1:] if argv is None else argv))
            check_data(config)
            stack.enter_context(cluster(config))
            run = open_run(config) if leader() else at(config.storage).child(config.run_name)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        return carry_out(config, run)


def leader() -> bool:
    """Whether this process speaks for the run: the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def carry_out(config: RunConfig, run: Storage) -> int:
    """Train and show; returns the exit code."""
    resuming = f"--resume --run-name {config.run_name}"
    try:
        outcome = on_ray(config, run) if config.scale.ray else without_ray(config)
    except (ShardError, CheckpointError) as error:
        print(f"error: {error}\nmended? go on with {resuming}", file=sys.stderr)
        return DAMAGED
    except RunFailed as error:
        print(f"error: {error}\ngo on with {resuming}", file=sys.stderr)
        return FAILED
    if outcome.status == "stopped":
        if leader():
            print(f"stopped after step {outcome.step}; go on with {resuming}")
        return STOPPED
    if leader():
        show(config, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
