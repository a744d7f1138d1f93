"""How long training waits for its input, with shards fetched ahead and without.

A third of the shards fits in memory at once, so that shards come and go as in a large data set;
the node's cache of far shards is empty at the start.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mambaflow.benchmarks.bench import BenchmarkConfig
from mambaflow.config import RECIPES
from mambaflow.data.batches import Batches, Layout
from mambaflow.data.shard_reader import ShardSet
from mambaflow.report.tables import Table
from mambaflow.training.loop import TrainState, fit


class OnDemand(ShardSet):
    """Shards that are fetched when their rows are asked for, and no sooner."""

    def expect(self, row_numbers: np.ndarray) -> None:
        """Nothing."""


def waits(config: BenchmarkConfig, kind: type[ShardSet]) -> tuple[list[float], float]:
    """Seconds that each step of one epoch waited for its batch, and seconds of the epoch."""
    # The smallest model: its steps are the shortest, and leave the least time to fetch in.
    recipe = RECIPES["first-run"](config.arch)
    train = replace(
        recipe.train,
        batch_size=config.batch_size,
        masks="strict",
        # One number of queries: all steps take equally long.
        min_queries=0,
        max_queries=config.queries,
    )
    # A cache of this measurement's own: in the node's, shards would be there from before.
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as cache:
        whole = ShardSet(config.data, "train")
        shards = len(whole.manifest.shards)
        # Opens nothing: what all shards would take follows from the manifest.
        third = whole.open_bytes * max(shards // 3, 1) // shards
        reader = kind(config.data, "train", cache=Path(cache), memory=third)
        batches = Batches(reader, Layout.of(reader.spec, recipe.model), train)
        state = TrainState(recipe.model, train, torch.device(config.device))
        start = time.perf_counter()
        steps = fit(state, batches, train, batches.steps_per_epoch)
        # Seconds by the loop's own clock, the same that a run logs as train/input_stall.
        found = [progress.waited for progress in steps]
        seconds = time.perf_counter() - start
        reader.close()
        return found, seconds


def measure(config: BenchmarkConfig) -> list[Table]:
    """One epoch of the first-run model, each way."""
    rows = []
    for name, kind in {"fetched ahead": ShardSet, "on demand": OnDemand}.items():
        found, seconds = waits(config, kind)
        # Apart from the first batch, for which nothing can have been fetched ahead.
        later = sum(found[1:]) / (seconds - found[0])
        rows.append(
            [name, f"{found[0]:.2f}", f"{100 * later:.2f} %", f"{1e3 * max(found[1:]):.0f}",
             f"{config.batch_size * len(found) / seconds:.1f}"]
        )  # fmt: skip
    heading = ["shards", "s to the first batch", "stall after it", "longest, ms", "samples/s"]
    return [Table(heading, rows, f"{config.arch}, first-run size, batch {config.batch_size}, "
                  f"one epoch of {config.data}")]  # fmt: skip
