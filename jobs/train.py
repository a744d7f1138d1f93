"""Train V1 or V2 from staged shards, on Ray or without it.

    python jobs/train.py --arch v2                      a private Ray on this machine
    ray job submit -- python jobs/train.py --arch v2    the cluster at RAY_ADDRESS
    torchrun --nproc-per-node 8 jobs/train.py --no-ray --use-gpu --num-workers 8
    python jobs/train.py --config runs/NAME/config.json --seed 1    as that run, but for the seed

Exit codes: 0 done; 1 failed; 2 bad input, nothing changed; 3 a shard or all checkpoints were
found damaged on the way: mend them, then go on with --resume; 143 stopped on request (SIGTERM,
SIGUSR1, SIGUSR2, SIGHUP, Ctrl-C on Ray, or a file named STOP in the run's folder) with the newest
step saved: go on with --resume. `ray job stop` grants 3 s before it kills; for a large model submit
the job with --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}'.
"""

import argparse
import contextlib
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import tyro
from tqdm import tqdm

from mambaflow.checks import lookup, require
from mambaflow.config import RECIPES, RunConfig
from mambaflow.data.shards import ShardError
from mambaflow.data.sources import EMBEDDED
from mambaflow.data.staging import stage_once
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.distributed.job_copy import check_copied, warn_of_a_copy
from mambaflow.host import leave, speak_plainly
from mambaflow.kernels.build import NativeError, compiler
from mambaflow.lease import owning
from mambaflow.models.weights import CheckpointError
from mambaflow.run_paths import RunPaths
from mambaflow.signals import STOPPED, leaving, stopping
from mambaflow.storage import at
from mambaflow.storage_base import StorageError
from mambaflow.training.preflight import (
    check_data,
    check_flags,
    check_launch,
    check_name,
    check_opening,
    identified,
    open_run,
    settings_of,
    settle,
)
from mambaflow.training.process_group import (
    ProcessGroup,
    Progress,
    launched_group,
    launched_workers,
)
from mambaflow.training.run import Outcome, RunFailed, train_and_score
from mambaflow.variables import check_variables, launched, stated

FAILED, BAD_INPUT, DAMAGED = 1, 2, 3
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Flags(RunConfig):
    """A run, and the one flag that is none of its fields."""

    config: str = ""
    """Defaults of all other flags: the config.json of a run (a file or s3://…), or any file like
    it, in place of --arch and --recipe. Its run name and --resume are not taken."""


def parse(argv: list[str]) -> RunConfig:
    """The run that the flags describe; --arch and --recipe, or --config, choose the defaults of the
    others."""
    # Twice: the first pass looks for these flags alone, since they choose the defaults that the
    # second pass parses and shows in --help. No abbreviations: --rec would be --recipe here and an
    # error there.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--arch", "--recipe", "--config", "--data"):
        first.add_argument(name)
    first.add_argument("--init-from", "--init_from")
    chosen, _ = first.parse_known_args(argv)
    default = defaults(chosen.arch, chosen.recipe, chosen.config)
    # Data and weights that are named are those that are meant; others must be what the
    # configuration says.
    if chosen.data is not None:
        default = replace(default, data_hash="")
    if chosen.init_from is not None:
        default = replace(default, init_hash="")
    flags = tyro.cli(
        Flags,
        args=argv,
        default=Flags(**vars(default)),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return RunConfig(**{f.name: getattr(flags, f.name) for f in fields(RunConfig)})


def defaults(arch: str | None, recipe: str | None, config: str | None) -> RunConfig:
    """What flags mean that are not given; None of these three is one that was not."""
    if config is None:
        make = lookup(RECIPES, "mission" if recipe is None else recipe, "recipe")
        return make("v2" if arch is None else arch)
    for name, value in (("arch", arch), ("recipe", recipe)):
        require(
            value is None,
            f"{name} (={value!r}) cannot stand beside config (={config!r}), which says what it "
            f"would; leave --{name} or --config out",
        )
    return settings_of(config)


def check_compiler(config: RunConfig) -> None:
    """Refuse --compile where this machine, which will compile, cannot."""
    # Workers of a cluster compile on their own nodes, which may have what the driver's lacks.
    elsewhere = config.scale.ray and stated("RAY_ADDRESS")
    if config.scale.compile == "off" or elsewhere:
        return
    try:
        compiler()
    except NativeError as error:
        raise ValueError(
            f"compile (={config.scale.compile!r}) needs a compiler: {error}; or --compile off"
        ) from error


@contextlib.contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """The Ray to train on, if the run wants one: at RAY_ADDRESS, or private to this run."""
    if not config.scale.ray:
        yield
        return
    set_ray_environment()
    # Imports Ray, which reads how it authenticates as it is imported: after the line above.
    from mambaflow.distributed.cluster import check_room, connect

    with connect():
        # In here, since only a connected cluster says what it has.
        check_room(config.scale)
        yield


def prepare(config: RunConfig, stack: contextlib.ExitStack) -> tuple[RunConfig, int]:
    """The run, settled, checked and opened, on data that are there, and under which number its
    folder is owned; that, and a Ray to train on, are in the stack. What needs no data comes first:
    bad input must leave nothing behind.

    Raises:
        ValueError, OSError: bad input.
    """
    check_compiler(config)
    # Before `settle`, which makes the addresses absolute.
    warn_of_a_copy(config.storage)
    check_copied(config.data)
    config = settle(config, shlex.join(["python", *sys.argv]))
    # What flags alone can be refused for, then data that are there, then the cluster, which takes
    # seconds; data that must be staged come after it, and last the run's folder: what is refused
    # has made none.
    check_flags(config)
    check_name(config)
    embedded = config.data in EMBEDDED
    if not embedded:
        check_data(config)
        config = identified(config)
        check_opening(config)  # for their sake, before a cluster is started
    # In main's stack: the cluster must outlive this function.
    stack.enter_context(cluster(config))
    if embedded:
        config = replace(config, data=at(stage_once(config.data)).uri)
        check_data(config)
        config = identified(config)
    return open_and_own(config, stack)


def open_and_own(config: RunConfig, stack: contextlib.ExitStack) -> tuple[RunConfig, int]:
    """The run with its folder opened, and under which number that is owned.

    Raises:
        ValueError: the name is taken, or another process trains the run.
    """
    folder, what = RunPaths.of(config).folder, f"run_name (={config.run_name!r})"
    # A new name is owned by whoever creates its configuration; a run that goes on may be training.
    if config.resume:
        check_opening(config)
    else:
        open_run(config)
    owner = stack.enter_context(owning(folder, what, config.take_over))
    config = replace(config, take_over=False)  # of this start alone, and not of the run
    if config.resume:
        open_run(config)
    return config, owner


@contextlib.contextmanager
def stoppable(config: RunConfig) -> Iterator[None]:
    """SIGTERM, its like, or Ctrl-C asks the run to stop; once more, it ends the driver at once."""
    folder = RunPaths.of(config).folder

    def ask(number: signal.Signals) -> None:
        log.info("stopping with a checkpoint; the same once more ends this at once")
        # A file, since the workers that are to stop may be on other nodes: the first of them looks
        # for it every second. Python runs this in the main thread, between two instructions, where
        # writing is allowed.
        folder.write(RunPaths.STOP, number.name.encode() + b"\n")

    # On Ray alone: without it signals are a worker's own affair (see training.stop_signal).
    with stopping(ask, signal.SIGINT):
        yield


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar that shows the newest progress of the run."""
    # disable=None: no bar in the log of a job.
    with tqdm(unit="step", dynamic_ncols=True, disable=None) as bar:

        def watch(progress: Progress) -> None:
            # Set, not counted: a run that goes on after a lost worker steps back.
            bar.total, bar.n = progress.steps, progress.step
            rate = progress.samples_per_second
            bar.set_postfix_str(f"loss {progress.loss:.4f}, {rate:.0f} samples/s")

        yield watch


def train(config: RunConfig, group: ProcessGroup | None, owner: int) -> Outcome:
    """Train on the connected Ray, or without one as a worker of `group`."""
    if group is not None:
        group.owner = owner
        with progress_bar() as group.watch:
            return train_and_score(config, group)
    # Imports Ray, and so only where the run is on it.
    from mambaflow.distributed.train import train_on_ray

    with stoppable(config), progress_bar() as watch:
        return train_on_ray(config, watch, owner=owner)


def show(config: RunConfig) -> None:
    """The end of a run, for a person."""
    paths = RunPaths.of(config)
    # A run that leaves the test split alone has no report.
    if config.train.test_images:
        print(paths.folder.read(RunPaths.TABLE).decode())
    print(f"run folder   {paths.folder.uri}")
    if config.train.test_images:
        print(f"picture      {paths.uri(RunPaths.PICTURE)}")
    print(f"TensorBoard  tensorboard --logdir {shlex.quote(config.storage)}")


def main(argv: list[str] | None = None) -> int:
    """Parse, check, train, show; returns the exit code."""
    speak_plainly()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where keys were found
    # However this ends, what was entered is left: a private Ray with all its processes, or the
    # process group.
    with contextlib.ExitStack() as stack:
        # Before anything is owned, and while the test is scored; steps have what saves.
        stack.enter_context(leaving())
        try:
            # Before the processes find one another: each sees the same flags and refuses them
            # alike.
            check_variables()
            config = parse(sys.argv[1:] if argv is None else argv)
            if not config.scale.ray:  # on Ray they are not torchrun's to set, and mean nothing
                check_launch(config.scale, launched_workers())
                launched()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        # With Ray this process is the driver, and trains nothing.
        group = None
        if not config.scale.ray:
            scale = config.scale
            group = stack.enter_context(launched_group(scale.use_gpu, scale.threads))
        ready = prepared(config, group, stack)
        return BAD_INPUT if ready is None else carry_out(*ready, group)


def prepared(
    config: RunConfig, group: ProcessGroup | None, stack: contextlib.ExitStack
) -> tuple[RunConfig, int] | None:
    """The run as its first process has prepared it, to all of them; None where it is refused."""
    ready = None
    # One process stages, and creates the run's folder; the others wait in the broadcast, and all of
    # them end where it hears of nothing to do.
    if leads(group):
        try:
            ready = prepare(config, stack)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
    return ready if group is None else group.broadcast(ready)


def leads(group: ProcessGroup | None) -> bool:
    """Whether this process speaks for the run: Ray's driver, or the first that torchrun started."""
    return group is None or group.rank == 0


def carry_out(config: RunConfig, owner: int, group: ProcessGroup | None) -> int:
    """Train and show; returns the exit code."""
    resuming = f"--resume --run-name {shlex.quote(config.run_name)}"
    try:
        outcome = train(config, group, owner)
    except (ShardError, CheckpointError) as error:
        print(f"error: {error}\nmended? go on with {resuming}", file=sys.stderr)
        return DAMAGED
    # Storage that does not answer, or is full: met by a worker without Ray, whose tries at it are
    # over, or by the driver, as it asks the workers to stop.
    except (RunFailed, StorageError) as error:
        print(f"error: {error}\ngo on with {resuming}", file=sys.stderr)
        return FAILED
    if outcome.failed:
        if leads(group):
            more = f"\ngo on with {resuming}" if outcome.status == "full" else ""
            print(f"error: {outcome.cause}{more}", file=sys.stderr)
        return FAILED
    if outcome.status == "stopped":
        if leads(group):
            print(f"stopped after step {outcome.step}; go on with {resuming}")
        return STOPPED
    if leads(group):
        show(config)
    return 0


if __name__ == "__main__":
    leave(main())
