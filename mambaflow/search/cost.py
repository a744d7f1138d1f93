"""What an answer of each trial's model takes, measured side by side."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mambaflow.checks import require
from mambaflow.data.batches import Layout
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.complete import EvalSet, complete
from mambaflow.evaluation.final_report import MEAN_SOLVER
from mambaflow.models.weights import CheckpointError, load_model, saved_steps
from mambaflow.run_paths import RunPaths
from mambaflow.search.sweep_paths import SweepPaths

MOST = 20
"""Models that are timed."""
IMAGES, ROUNDS = 4, 6
# Large models on one thread: after this no further round begins.
ROUNDS_S = 120


@dataclass(frozen=True)
class Timing:
    """Seconds that an image takes, by trial."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Trial -> seconds per image of the posterior mean, with one thread."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Trial -> why there is no number of it."""
    images: int = IMAGES
    size: int = 0
    """Pixels on a side."""


def time_answers(
    paths: SweepPaths, trials: Sequence[str], images: int = IMAGES, rounds: int = ROUNDS
) -> Timing:
    """Time the posterior mean of a few validation images by each trial's newest checkpoint.

    On one thread; the models take turns round by round, so that what else the machine does hits
    all, and of each the least time counts, since whatever disturbs only adds to it.

    Args:
        trials: names; the first MOST are timed.

    Raises:
        ValueError: no image or no round.
    """
    for name, value in (("images", images), ("rounds", rounds)):
        require(value > 0, f"{name} (={value}) must be positive; use 1 or more")
    works: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    size = 0
    for trial in trials[:MOST]:
        # Whatever is wrong with one trial's folder or data, others can be timed.
        try:
            works[trial], size = _work(paths, trial, images)
        except (OSError, ValueError, RuntimeError) as error:
            left_out[trial] = f"{type(error).__name__}: {error}"
    seconds = {name: best / images for name, best in _least(works, rounds).items()}
    return Timing(seconds, left_out, images, size)


def _work(paths: SweepPaths, trial: str, images: int) -> tuple[Callable[[], object], int]:
    """What is to be timed, and the size of its images."""
    folder = paths.trial(trial)
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder.uri} holds no complete checkpoint")
    model, info = load_model(f"{folder.uri}/{RunPaths.checkpoint(steps[-1])}")
    shards = ShardSet(info.config.data, "validation")
    try:
        layout = Layout.of(shards.spec, info.config.model)
        eval_set = EvalSet.read(shards, layout, images)
    finally:
        shards.close()
    require(
        len(eval_set) == images,
        f"validation images (={len(eval_set)}) must be {images} or more; stage more of them",
    )
    return lambda: complete(model, eval_set, MEAN_SOLVER), layout.size


def _least(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(works, math.inf)
    begun = time.perf_counter()
    with _one_thread():
        for number in range(rounds):
            if number > 1 and time.perf_counter() - begun > ROUNDS_S:
                break
            for name, work in works.items():
                start = time.perf_counter()
                work()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
