"""How long each trial is trained, so that small and large models are compared fairly."""

import math
import statistics
import time
from dataclasses import replace

import torch

from mambaflow.config import RunConfig
from mambaflow.data.batches import Batches, Layout
from mambaflow.data.shard_reader import ShardSet
from mambaflow.models.velocity_field import VelocityField, parameters
from mambaflow.search.config import SearchConfig
from mambaflow.training.flops import step_flops
from mambaflow.training.loop import TrainState, fit
from mambaflow.training.preflight import total_steps

# Steps that are timed for a budget in seconds, after one that warms up.
TIMED = 3


def steps_of(run: RunConfig, base: RunConfig, search: SearchConfig, shards: ShardSet) -> int:
    """Steps of a trial, at least one; 0 for a budget in seconds, which its machine must tell.

    Args:
        run: the trial.
        base: the configuration whose samples, or FLOPs, every trial gets.
    """
    steps = total_steps(base, len(shards))
    if search.budget == "seconds":
        return 0
    if search.budget == "samples":
        return max(1, steps * base.train.batch_size // run.train.batch_size)
    return max(1, round(steps * flops_of_a_step(base, shards) / flops_of_a_step(run, shards)))


def flops_of_a_step(run: RunConfig, shards: ShardSet) -> float:
    """FLOPs of a training step of a run on some shards: forward and backward, products alone."""
    return float(step_flops(run.model, run.train, shards.spec.known, shards.spec.target))


def parameters_of(run: RunConfig) -> int:
    """Numbers that are trained."""
    # Without memory for them: shapes tell their number.
    with torch.device("meta"):
        return parameters(VelocityField(run.model))


def with_steps(run: RunConfig, steps: int, search: SearchConfig, rows: int) -> RunConfig:
    """The run with this length, and its validations spread evenly over it."""
    train = run.train
    # Epochs must not end it first.
    epochs = max(train.epochs, math.ceil(steps * train.batch_size / rows))
    # Rounded up, so that the k-th validation comes when k shares of the budget are spent.
    every = math.ceil(steps / search.validations)
    return replace(run, train=replace(train, max_steps=steps, epochs=epochs, eval_every=every))


def timed_steps(run: RunConfig, minutes: float, device: torch.device) -> int:
    """Steps that fit into some minutes of training on this machine, as it is now."""
    shards = ShardSet(run.data, "train")
    batches = Batches(shards, Layout.of(shards.spec, run.model), run.train)
    steps = fit(TrainState(run.model, run.train, device), batches, run.train, TIMED + 2)
    times = []
    for _ in range(TIMED + 1):
        start = time.perf_counter()
        next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    shards.close()
    return max(1, int(60 * minutes / statistics.median(times[1:])))
