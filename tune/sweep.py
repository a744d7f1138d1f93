"""Search fields of a run with Ray Tune: width and depth, the optimiser, or the way from V1 to V2.

    python tune/sweep.py --arch v2 --data data/sample --space size --num-samples 12 --run-name sizes
    python tune/sweep.py --run-name sizes --resume …     the same flags: goes on after any end
    python tune/sweep.py --status --run-name sizes       where it stands, from anywhere
    python tune/sweep.py --report-only --run-name sizes  its report again, without training
    python tune/sweep.py stop 0007 --run-name sizes      end a trial while the sweep runs
    python tune/sweep.py add 8 --run-name sizes          try more
    ray job submit -- python tune/sweep.py …             on the cluster at RAY_ADDRESS

The flags of a run are those of jobs/train.py, and describe the base configuration that every trial
is a variation of. A trial is a run of its own in the sweep's folder, and never sees the test split.

Exit codes: 0 done, or at the end of --max-hours; 1 failed; 2 bad input, nothing changed; 4 done,
and some trials failed: the ledger has their causes; 143 stopped (SIGTERM, SIGUSR1, SIGUSR2,
SIGHUP or Ctrl-C), with every trial's checkpoint saved: go on with --resume.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from spaces import SPACES

from mambaflow.checks import lookup, require
from mambaflow.config import RECIPES, RunConfig
from mambaflow.data.sources import EMBEDDED
from mambaflow.data.staging import stage_once
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.distributed.job_copy import check_copied, warn_of_a_copy
from mambaflow.host import leave, speak_plainly
from mambaflow.lease import owning
from mambaflow.search.board import Board
from mambaflow.search.conductor import Conductor
from mambaflow.search.config import SearchConfig, SweepConfig
from mambaflow.search.ledger import Ledger
from mambaflow.search.opening import check_sweep, open_sweep, read_sweep
from mambaflow.search.proposals import optuna_log
from mambaflow.search.space import Product, Space, check_space
from mambaflow.search.sweep_paths import SweepPaths
from mambaflow.search.sweep_report import write_report
from mambaflow.signals import STOPPED, leaving, stopping
from mambaflow.storage import at
from mambaflow.training.preflight import check_data, check_flags, identified, settle
from mambaflow.variables import check_variables

FAILED, BAD_INPUT, TRIALS_FAILED = 1, 2, 4
LINE_S = 60.0  # between lines of progress where there is no terminal
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the command line says."""

    status: bool = False
    """Say where the sweep stands, from its ledger, and end."""
    report_only: bool = False
    """Make the report of what there is again, and end."""
    search: SearchConfig = field(default_factory=SearchConfig)
    run: RunConfig = field(default_factory=RunConfig)


def parse(argv: list[str]) -> Flags:
    """The sweep that the flags describe; --arch and --recipe choose the defaults of the others."""
    # As in jobs/train.py: the first pass looks for these two alone.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--arch", default="v2")
    first.add_argument("--recipe", default="mission")
    chosen, _ = first.parse_known_args(argv)
    run = lookup(RECIPES, chosen.recipe, "recipe")(chosen.arch)
    return tyro.cli(
        Flags,
        args=argv,
        default=Flags(run=run),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def space_of(config: SweepConfig) -> Space:
    """The space by its name, or by FILE.py:FUNCTION.

    Raises:
        ValueError: no such space, or one that can draw what is no run.
    """
    name, base = config.search.space, config.run
    file, colon, function = name.rpartition(":")
    make = _loaded(file, function) if colon else lookup(SPACES, name, "space")
    space = make(base)
    check_space(space, base)
    if config.search.search == "grid":
        next(space.all())  # refuses what is continuous
    return space


def _loaded(file: str, function: str) -> Callable[[RunConfig], Space]:
    # A job on a cluster has its file with its code, as both were when it was submitted.
    beside = Path(__file__).resolve().parents[1] / file
    path = beside if beside.is_file() else Path(file)
    require(path.is_file(), f"space (={file}:{function}) must be a file; {file} is not there")
    spec = importlib.util.spec_from_file_location("spaces_of_a_user", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = {key: value for key, value in vars(module).items() if callable(value)}
    found: Callable[[RunConfig], Space] = lookup(made, function, f"function of {file}")
    return found


def prepare(config: SweepConfig, stack: contextlib.ExitStack) -> tuple[SweepConfig, Space, int]:
    """The sweep with its data staged and its folder opened, its space, and the trials at once;
    the Ray to train on is in the stack.

    Raises:
        ValueError, OSError: bad input; nothing was written.
    """
    command = shlex.join(["python", *sys.argv])
    # Before `settle`, which makes the addresses absolute.
    warn_of_a_copy(config.run.storage)
    check_copied(config.run.data)
    config = replace(config, run=settle(config.run, command))
    check_sweep(config)
    space = space_of(config)
    base = replace(config.run, resume=False)
    check_flags(base)
    embedded = base.data in EMBEDDED
    if not embedded:
        check_data(base)
        config = replace(config, run=identified(config.run))
        check_sweep(config)  # once more, for their sake
    set_ray_environment()
    # Imports Ray, which reads how it authenticates as it is imported: after the line above.
    from mambaflow.distributed.cluster import await_room, check_room, connect
    from mambaflow.distributed.sweep import concurrency

    stack.enter_context(connect())
    check_room(base.scale)
    await_room(base.scale)
    if embedded:
        config = replace(config, run=replace(config.run, data=at(stage_once(base.data)).uri))
        check_data(replace(config.run, resume=False))
        config = replace(config, run=identified(config.run))
    if not config.run.resume:
        open_sweep(config)
    what = f"run_name (={config.run.run_name!r})"
    stack.enter_context(owning(SweepPaths.of(config.run).folder, what, config.run.take_over))
    if config.run.resume:
        open_sweep(config)
    return config, space, concurrency(config.search, config.run.scale)


@contextlib.contextmanager
def stoppable(conductor: Conductor) -> Iterator[None]:
    """SIGTERM, its like, or Ctrl-C has every trial save and stop; once more, it ends the driver at
    once."""

    def ask(number: signal.Signals) -> None:
        # In a flag alone: the lock may be held by the very code that this interrupts.
        conductor.asked_to_stop = number.name

    with stopping(ask, signal.SIGINT):
        yield


@contextlib.contextmanager
def shown(conductor: Conductor) -> Iterator[Callable[[], None]]:
    """A table of the trials on a terminal; else a line a minute."""
    console, last = Console(), [time.monotonic() - LINE_S]
    if not console.is_terminal:

        def line() -> None:
            if time.monotonic() - last[0] >= LINE_S:
                last[0] = time.monotonic()
                # Locked: another thread adds trials to the board.
                with conductor.lock:
                    log.info("%s; best: %s", conductor.board, best(conductor.board))

        yield line
        return
    with Live(console=console, refresh_per_second=2) as live:

        def update() -> None:
            with conductor.lock:
                live.update(table(conductor.board, console.height - 6))

        yield update


def best(board: Board) -> str:
    """The leading trial in a line."""
    if not board.ranked:
        return "none yet"
    leader = board.ranked[0]
    assert leader.last is not None
    return f"{leader.name} with {leader.last.psnr:.2f} dB at {100 * leader.share:.0f} %"


def table(board: Board, rows: int = 40) -> Table:
    """The trials: those that run, then the best."""
    shown = Table(title=str(board), title_justify="left")
    for heading in ("trial", "PSNR", "budget", "status", "values"):
        shown.add_column(heading, justify="left" if heading in ("trial", "values") else "right")
    running = board.with_status("running")
    rest = [trial for trial in board.ranked if trial.status != "running"]
    failed = board.with_status("failed", "waiting")
    for trial in (running + rest + failed)[: max(rows, 5)]:
        psnr = f"{trial.last.psnr:.2f} ± {trial.last.error:.2f}" if trial.last else ""
        values = ", ".join(f"{k.split('.')[1]} {v}" for k, v in trial.values.items())
        shown.add_row(
            trial.name, psnr, f"{100 * trial.share:.0f} %", trial.status, trial.label or values
        )
    return shown


def sweep(config: SweepConfig) -> int:
    """Prepare, run, report; returns the exit code."""
    with contextlib.ExitStack() as stack:
        try:
            config, space, concurrent = prepare(config, stack)
        # RuntimeError: no room on the cluster, which says what is missing.
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        from mambaflow.distributed.asha import Asha
        from mambaflow.distributed.sweep import run_on_tune, threads_of

        threads = threads_of(config.run.scale, concurrent)
        conductor = Conductor(config, space, Asha(config.search), threads)
        try:
            conductor.begin(config.run.command, concurrent)
            print(f"{conductor.paths.folder.uri}: {concurrent} trials at once", flush=True)
            with stoppable(conductor), shown(conductor) as watch:
                run_on_tune(conductor, concurrent, watch)
            conductor.close()
        # A ledger that another driver took over, storage that fails, a cluster that is lost.
        except (RuntimeError, ValueError, OSError) as error:
            print(f"error: {error}\ngo on with --resume", file=sys.stderr)
            return FAILED
    return finish(conductor)


def report(paths: SweepPaths, space: Space) -> str:
    """Make the report and Optuna's journal of what there is; returns what to show of them."""
    if isinstance(space, Product):
        board = Board.of(Ledger(paths.folder).events())
        paths.folder.write(SweepPaths.OPTUNA, optuna_log(space, board))
    return write_report(paths)


def finish(conductor: Conductor) -> int:
    """Report; returns the exit code."""
    print(report(conductor.paths, conductor.space))
    board = conductor.board
    print(board)
    if board.ended == "failed":
        print(f"error: {board.cause}", file=sys.stderr)
        return FAILED
    if board.ended == "interrupted":
        name = shlex.quote(conductor.sweep.run.run_name)
        print(f"stopped; go on with --resume --run-name {name}")
        return STOPPED
    return TRIALS_FAILED if board.with_status("failed") else 0


def look(flags: Flags) -> int:
    """--status and --report-only; returns the exit code."""
    paths = SweepPaths.of(flags.run)
    try:
        config = read_sweep(paths)
        if flags.report_only:
            print(report(paths, space_of(config)))
            return 0
        board = Board.of(Ledger(paths.folder).events())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    Console().print(table(board))
    print(f"{board.ended}; last heard of {time.strftime('%Y-%m-%d %H:%M:%S', board.when)}")
    return 0


def request(argv: list[str]) -> int:
    """`stop TRIAL` and `add N` while a sweep runs; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"tune/sweep.py {argv[0]}")
    parser.add_argument("what", help="the trial to stop, or how many more to try")
    parser.add_argument("--run-name", required=True)
    parser.add_argument("--storage", default="runs")
    args = parser.parse_args(argv[1:])
    paths = SweepPaths(at(args.storage).child(args.run_name))
    try:
        read_sweep(paths)
        board = Board.of(Ledger(paths.folder).events())
        if argv[0] == "stop":
            lookup(board.trials, args.what, "trial")
            asked: dict[str, object] = {"stop": args.what}
        else:
            good = args.what.isdigit() and int(args.what) > 0
            require(good, f"add (={args.what}) must be a whole number above 0; use 4")
            asked = {"more": int(args.what)}
        # A name of its own, so that the same may be asked for twice.
        key = f"{SweepPaths.REQUESTS}{uuid.uuid4().hex}.json"
        paths.folder.write(key, json.dumps(asked).encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"asked for; the sweep's driver answers within seconds if it runs ({board.ended})")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse, then sweep, look or ask; returns the exit code."""
    speak_plainly()
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where keys were found
    try:
        check_variables()
        if argv and argv[0] in ("stop", "add"):
            return request(argv)
        flags = parse(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if flags.status or flags.report_only:
        return look(flags)
    with leaving():  # before its trials are there, and after: they are asked in between
        return sweep(SweepConfig(search=flags.search, run=flags.run))


if __name__ == "__main__":
    leave(main())
