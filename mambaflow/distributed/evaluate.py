"""Evaluation as a batch-inference job of Ray Data: units of work through a pool of actors.

What goes through Ray Data are units of work, not images: an actor reads the few shards that it
needs, and keeps its rows itself, in files whose names follow from what they hold. So what Ray does
twice is written twice with the same bytes, and a row that is there is never lost. Ray Data's own
checkpoint of finished ids was left aside: it knows no fingerprint, so that rows of other weights
would count as done; it reads all input again; its writer names files anew at each run; and its
actor wants a gibibyte.
"""

import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data.exceptions import ExecutionTimeoutError

from mambaflow.checks import require
from mambaflow.distributed.cluster import head_watch, loss_named
from mambaflow.distributed.progress import last_line
from mambaflow.evaluation.answers import Answerer, Job
from mambaflow.evaluation.cells import EvaluateConfig, Unit
from mambaflow.evaluation.evaluate import Done, Run, work
from mambaflow.evaluation.rows import Results
from mambaflow.storage import at

# Ray Data would wait without a word where nothing moves any more: no core for its actors, say. The
# longest unit, hundreds of calls at 256 x 256 on a core, takes hours.
NO_PROGRESS_S = 6 * 3600
# Times that an actor may be started anew, and that a unit may be tried again where the first died
# under it. Ray Data's own are without limit: a unit that takes all memory would go round for ever.
RESTARTS, RETRIES = 3, 2


class Worker:
    """One actor: it loads every checkpoint once, and answers unit after unit."""

    def __init__(self, job: bytes, out: str) -> None:
        # One thread on CPU, whatever the machine: threads may split a sum, and move its last bits.
        torch.set_num_threads(1)
        self.answerer, self.results = Answerer(pickle.loads(job)), Results(at(out))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Make the rows of some units, and say how it went."""
        units = [pickle.loads(unit) for unit in batch["unit"]]
        done = [work(self.answerer, self.results, unit) for unit in units]
        return {"done": [pickle.dumps(one) for one in done]}


def workers_of(config: EvaluateConfig) -> int:
    """Actors of the connected cluster: as many as asked for, or as it has cores or GPUs.

    Raises:
        ValueError: more than it has.
    """
    kind, share = ("GPU", config.gpus_per_worker) if config.use_gpu else ("CPU", 1.0)
    have = int(ray.cluster_resources().get(kind, 0) / share)
    require(
        1 <= (config.num_workers or have) <= have,
        f"num_workers (={config.num_workers}) must be in [1, {have}], what the cluster's {kind}s "
        "hold; use 0 for all of them" + (", or leave out --use-gpu" if config.use_gpu else ""),
    )
    return config.num_workers or have


def on_ray(config: EvaluateConfig, workers: int) -> Run:
    """Units through a pool of `workers` actors on the connected cluster; it raises RunFailed where
    that is lost."""

    def run(job: Job, out: str, units: list[Unit]) -> Iterator[Done]:
        if units:
            with loss_named():
                yield from _made(config, workers, job, out, units)

    return run


def _made(
    config: EvaluateConfig, workers: int, job: Job, out: str, units: list[Unit]
) -> Iterator[Done]:
    # The actors' cores are all that the job takes: what reads the input and joins the output runs
    # in the driver. A step that asked for a core of its own would wait for the actors without end.
    wants = {"num_gpus": config.gpus_per_worker} if config.use_gpu else {"num_cpus": 1}
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the job has a bar of its own, in rows
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    # It tells of each start, and that bars are off.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"unit": pickle.dumps(unit)} for unit in units]
    # A block for each unit: an actor is given one when it is free.
    blocks = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings():
        # The two bounds have no other way in yet.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        done = blocks.map_batches(
            Worker,
            fn_constructor_args=(pickle.dumps(job), out),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
            max_restarts=RESTARTS,
            max_task_retries=RETRIES,
            **wants,
        )
    try:
        for row in done.iter_rows():
            yield pickle.loads(row["done"])
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        head_watch().require()  # actors that are lost with their head are another failure
        raise RuntimeError(f"an actor failed: {last_line(error)}") from error
