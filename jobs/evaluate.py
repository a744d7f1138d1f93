"""Evaluate checkpoints on held-out images: completion, samples, super-resolution.

    python jobs/evaluate.py --checkpoint runs/NAME --data data/sample --out results/NAME
    python jobs/evaluate.py --checkpoint v1=runs/A v2=runs/B --samplers mean heun exponential \\
        --nfe 1 2 10 20 50 100 --resolutions 64 128 --known-shares 0.05 0.1 0.2 0.5 --out s3://…
    python jobs/evaluate.py --out results/NAME --status
    python jobs/evaluate.py --out results/NAME --report-only
    ray job submit -- python jobs/evaluate.py …      on the cluster at RAY_ADDRESS

Rows are kept as they are made: killed at any moment, the same command makes those that are missing;
with more flags, those of the new cells alone. Exit codes: 0 done; 1 failed, the same command goes
on; 2 bad input, nothing changed; 4 done, and some rows failed: they are kept with their errors, and
--retry-errors does them again; 143 stopped (SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP).
"""

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import tyro
from tqdm import tqdm

from mambaflow.checks import require
from mambaflow.data.shards import MANIFEST
from mambaflow.data.sources import EMBEDDED, open_source
from mambaflow.data.stage_config import StageConfig
from mambaflow.data.staging import in_process as stage_here
from mambaflow.data.staging import stage, stage_once
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.evaluation.cells import EvaluateConfig
from mambaflow.evaluation.evaluate import Progress, Run, evaluate, in_process, status
from mambaflow.evaluation.evaluation_report import write_report
from mambaflow.evaluation.plan import Plan, plan
from mambaflow.evaluation.rows import Results
from mambaflow.host import FAILED, leave, speak_plainly
from mambaflow.signals import leaving
from mambaflow.storage import at
from mambaflow.variables import check_variables

BAD_INPUT, ROWS_FAILED = 2, 4
GOES_ON = "the same command goes on"
LINE_S = 60.0  # between lines of progress where there is no terminal
log = logging.getLogger(__name__)


def staged(config: EvaluateConfig) -> str:
    """The address of shards: those given, or those that a source is staged to."""
    if at(config.data).child(config.split).exists(MANIFEST):
        return config.data
    if config.data in EMBEDDED:
        return stage_once(config.data)
    # Beside the results, whose masks they are; of the training images no more than one is wanted.
    # Labels are no part of an evaluation, and sources of many classes have some beyond the format.
    source, out = open_source(config.data, labels="ignore"), at(config.out).child("data").uri
    for line in source.found().lines():
        log.info("%s: %s", config.data, line)
    held = max(1, min(256, source.count("train") // 10))
    (first,) = source.items("train", np.zeros(1, np.int64))
    require(first.pixels is not None, f"data (={config.data}): {first.fault}; mend it")
    size = 0 if first.pixels is None else len(first.pixels)
    asked = StageConfig(
        source=config.data, out=out, limit=1, validation=held, size=size, labels="ignore"
    )
    log.info("staged %s: %s", out, stage(asked, source, stage_here(source)))
    return out


@contextlib.contextmanager
def runner(config: EvaluateConfig) -> Iterator[tuple[Run, int]]:
    """What makes the rows, and with how many workers: Ray at RAY_ADDRESS or a private one, or
    this process."""
    if not config.ray:
        yield in_process, 1
        return
    set_ray_environment()
    # Imports Ray, which reads how it authenticates as it is imported: after the line above.
    from mambaflow.distributed.cluster import connect
    from mambaflow.distributed.evaluate import on_ray, workers_of

    with connect(lost):
        workers = workers_of(config)
        yield on_ray(config, workers), workers


def lost(why: str) -> None:
    """The cluster is: end at once."""
    print(f"\nerror: {why}\n{GOES_ON}", file=sys.stderr)
    leave(FAILED)


@contextlib.contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """A bar in rows on a terminal; else a line a minute."""
    last, told = [time.monotonic()], [False]
    with tqdm(unit="row", dynamic_ncols=True, disable=None) as bar:

        def watch(progress: Progress) -> None:
            bar.total, bar.n = progress.rows, progress.done
            left = progress.seconds_left
            about = "" if left is None else f"about {_time(left)} left"
            bar.set_postfix_str(f"{about}, {progress.failed} failed" if progress.failed else about)
            first = about and not told[0]
            if bar.disable and (first or time.monotonic() - last[0] >= LINE_S):
                log.info("%d of %d rows, %d failed; %s", progress.done, progress.rows,
                         progress.failed, about or "no estimate yet")  # fmt: skip
                last[0], told[0] = time.monotonic(), bool(about)

        yield watch


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def announce(planned: Plan, config: EvaluateConfig) -> None:
    """What will be computed."""
    print(f"{len(planned.images)} of {planned.held} images, {len(planned.cells)} cells:")
    for cell in planned.cells:
        what = f"{cell.resolution} x {cell.resolution}, {cell.known} known"
        asked = f", {cell.asked} asked" if cell.asked else ""
        calls = f", {cell.nfe} calls" if cell.nfe else ""
        settings = f" ({cell.settings})" if cell.settings else ""
        print(f"  {cell.checkpoint} {cell.sampler}{settings}{calls}: {what}{asked}")
    print(f"{len(planned.keys)} rows, kept in {at(config.out).uri}", flush=True)


def run(config: EvaluateConfig, command: str) -> int:
    """Plan, make what is missing, count, report; returns the exit code."""
    results = Results(at(config.out))
    with contextlib.ExitStack() as stack:
        try:
            config = replace(config, data=staged(config))
            planned = plan(config)
            announce(planned, config)
            make, workers = stack.enter_context(runner(config))
            # The first thing that is written, when all else was found good.
            results.claim(planned.job.fingerprint)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        with shown() as watch:
            evaluate(
                planned, results, make, workers=workers, retry_errors=config.retry_errors,
                command=command, watch=watch,
            )  # fmt: skip
    return finish(planned, results)


def finish(planned: Plan, results: Results) -> int:
    """Count what is there against what was asked for, and report; returns the exit code."""
    counts = status(results, planned.keys)
    print(counts)
    print(write_report(results))
    if not counts.whole:
        return FAILED
    return ROWS_FAILED if counts.failed else 0


def look(config: EvaluateConfig) -> int:
    """--status and --report-only; returns the exit code."""
    results = Results(at(config.out))
    try:
        if config.report_only:
            print(write_report(results))
        else:
            print(status(results))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse, and do what is asked for; returns the exit code."""
    speak_plainly()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where keys were found
    given = sys.argv[1:] if argv is None else argv
    try:
        check_variables()
        config = tyro.cli(EvaluateConfig, args=given, description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if config.status or config.report_only:
        return look(config)
    try:
        with leaving():
            return run(config, f"python jobs/evaluate.py {shlex.join(given)}")
    except (RuntimeError, OSError) as error:
        print(f"error: {error}\n{GOES_ON}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    leave(main())
