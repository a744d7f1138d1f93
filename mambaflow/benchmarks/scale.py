"""What training on many GPUs asks of storage, of the network and of time.

Rates are measured here, of one worker alone; the rest is arithmetic, and its formulas stand under
the tables. Nothing of the network is measured, nor how workers wait for one another.
"""

import contextlib
import math
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mambaflow.benchmarks.bench import BenchmarkConfig, device_name, race
from mambaflow.config import RECIPES, RunConfig
from mambaflow.data.batches import Batches, Layout, Prefetcher
from mambaflow.data.device_rows import device_resident
from mambaflow.data.shard_reader import THREADS, Fetcher, ShardSet
from mambaflow.models.weights import CheckpointInfo
from mambaflow.report.tables import Table
from mambaflow.storage import at
from mambaflow.storage_base import Storage
from mambaflow.training import checkpoint
from mambaflow.training.loop import TrainState, fit

READ_BYTES = 2**28  # of shards, at most, in a round
FOREVER = 10**9


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is measured of one worker, and what its training split holds."""

    rows: int
    shards: int
    data_bytes: int
    """Of all shards, as they are in storage."""
    resident: bool
    """Whether a worker reads all shards before its first step, to hold them on its GPU."""
    batch: int
    """Images of a worker in a step."""
    step_s: float
    read_s: float
    """To read a byte of the shards: fetched, verified, decoded."""
    checkpoint_bytes: int
    checkpoint_s: float
    gradient_bytes: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The same run on a number of GPUs, each of which takes the measured batch in the measured
    time: the rates' letters in formulas are R rows, S shards, D bytes of them, b images in a step,
    t seconds, C bytes of a checkpoint, w seconds to write it, P bytes of gradients."""

    rates: Rates
    gpus: int
    gpus_per_node: int
    eval_every: int
    """Steps between checkpoints."""
    trials: int
    epochs: int
    """Of each trial."""

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def step_images(self) -> int:
        return self.gpus * self.rates.batch

    @property
    def samples_per_s(self) -> float:
        return self.step_images / self.rates.step_s

    @property
    def epoch_steps(self) -> float:
        return self.rates.rows / self.step_images

    @property
    def epoch_s(self) -> float:
        return self.rates.rows / self.samples_per_s

    @property
    def node_shards(self) -> float:
        """Shards that a node reads in its first epoch, on average: those with a row of its share,
        which are rows at random, or all."""
        rates = self.rates
        missed = 0.0 if rates.resident else (1 - 1 / self.nodes) ** (rates.rows / rates.shards)
        return rates.shards * (1 - missed)

    @property
    def node_bytes(self) -> float:
        return self.node_shards * self.rates.data_bytes / self.rates.shards

    @property
    def gpu_bytes_per_s(self) -> float:
        """From storage, over the first epoch."""
        return self.node_bytes / min(self.gpus, self.gpus_per_node) / self.epoch_s

    @property
    def all_bytes_per_s(self) -> float:
        return self.nodes * self.node_bytes / self.epoch_s

    @property
    def all_reduce_bytes(self) -> float:
        """That a GPU sends in a step, and receives, in a ring."""
        return 2 * (self.gpus - 1) / self.gpus * self.rates.gradient_bytes

    @property
    def network_bits_per_s(self) -> float:
        """Of a network that needs no longer for it than the step takes."""
        return 8 * self.all_reduce_bytes / self.rates.step_s

    @property
    def checkpoint_bytes_per_hour(self) -> float:
        return self.rates.checkpoint_bytes * 3600 / (self.eval_every * self.rates.step_s)

    @property
    def checkpoint_share(self) -> float:
        """Of the time, in which all wait for the first worker."""
        training = self.eval_every * self.rates.step_s
        return self.rates.checkpoint_s / (training + self.rates.checkpoint_s)

    @property
    def trial_hours(self) -> float:
        """Of a trial on one GPU."""
        return self.epochs * self.rates.rows / self.rates.batch * self.rates.step_s / 3600

    @property
    def sweep_gpu_hours(self) -> float:
        return self.trials * self.trial_hours

    @property
    def sweep_hours(self) -> float:
        """With a GPU for each trial that runs."""
        return math.ceil(self.trials / self.gpus) * self.trial_hours


def read_split(config: BenchmarkConfig, shards: ShardSet) -> int:
    """Read the split's first shards, as a worker does whose node has none yet; their bytes."""
    found = 0
    # A cache of its own: in the node's, shards in S3 would be there from before.
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as cache:
        fetcher = Fetcher(shards.storage, shards.manifest, Path(cache))
        with contextlib.closing(fetcher):
            for number, info in enumerate(shards.manifest.shards):
                if found > READ_BYTES:
                    break
                ahead = range(number, min(number + THREADS, len(shards.manifest.shards)))
                fetcher.begin(ahead, THREADS)
                fetcher.take(number)
                found += info.bytes
    return found


@contextlib.contextmanager
def checkpoint_folder(config: BenchmarkConfig) -> Iterator[Storage]:
    """Where a run's checkpoints would be, under a name of its own; nothing is left there."""
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as here:
        folder = at(config.storage or here).child(f"benchmark-{uuid.uuid4().hex}")
        try:
            yield folder
        finally:
            folder.delete_tree("")


def rates_of(config: BenchmarkConfig, run: RunConfig, shards: ShardSet) -> Rates:
    """Measure a step, the reading of shards, and a checkpoint, each by itself."""
    device = torch.device(config.device)
    rows = device_resident(shards, device, images=False)
    batches = Batches(shards, Layout.of(shards.spec, run.model), run.train, device_rows=rows)
    state = TrainState(run.model, run.train, device)
    with contextlib.ExitStack() as stack:
        # As in training: batches are made ahead for a GPU alone.
        ahead = Prefetcher(batches, device, FOREVER)
        stack.callback(ahead.close)
        steps = fit(state, batches if device.type == "cpu" else ahead, run.train, FOREVER)
        step_s = race({"step": lambda: next(steps)}, config.repeats, config.device)["step"]
        folder = stack.enter_context(checkpoint_folder(config))
        info = CheckpointInfo(step=state.step, config=run)
        works = {
            "save": lambda: checkpoint.save(state, info, folder),
            "read": lambda: read_split(config, shards),
        }
        times = race(works, config.repeats, config.device)
        written = sum(len(folder.read(key)) for key in folder.list())
    weights = [p for p in state.model.parameters() if p.requires_grad]
    return Rates(
        rows=len(shards),
        shards=sum(1 for shard in shards.manifest.shards if shard.rows),
        data_bytes=sum(shard.bytes for shard in shards.manifest.shards),
        resident=rows is not None,
        batch=config.batch_size,
        step_s=step_s,
        read_s=times["read"] / read_split(config, shards),
        checkpoint_bytes=written,
        checkpoint_s=times["save"],
        gradient_bytes=sum(p.numel() * p.element_size() for p in weights),
    )


def measure(config: BenchmarkConfig) -> list[Table]:
    """The rates, and what follows from them for each number of GPUs."""
    run = RECIPES["mission"](config.arch)
    train = replace(
        run.train,
        batch_size=config.batch_size,
        precision=config.precision,
        max_queries=config.queries,
    )
    run, shards = replace(run, train=train), ShardSet(config.data, "train")
    rates = rates_of(config, run, shards)
    shards.close()
    scales = [
        Scale(
            rates=rates, gpus=gpus, gpus_per_node=config.gpus_per_node,
            eval_every=train.eval_every, trials=config.trials, epochs=config.epochs,
        )
        for gpus in config.gpus
    ]  # fmt: skip
    return [measured(config, rates), work(scales), reading(scales), talking(scales), sweep(scales)]


def said(value: float | int) -> str:
    """Three digits, or the whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measured(config: BenchmarkConfig, rates: Rates) -> Table:
    """What the other tables are made from."""
    rows = [
        ["samples/s (b / t)", said(rates.batch / rates.step_s)],
        ["images in a step (b)", said(rates.batch)],
        ["a step, ms (t)", said(1e3 * rates.step_s)],
        ["training images (R)", said(rates.rows)],
        ["shards (S)", said(rates.shards)],
        ["their MB (D)", said(rates.data_bytes / 1e6)],
        ["bytes of a shard for each image", said(rates.data_bytes / rates.rows)],
        ["MB/s of shards that the steps use up", said(used(rates) / 1e6)],
        ["MB/s of shards that a worker reads, verifies, decodes", said(1 / rates.read_s / 1e6)],
        ["MB of a checkpoint (C)", said(rates.checkpoint_bytes / 1e6)],
        ["s to write it (w)", said(rates.checkpoint_s)],
        ["MB of gradients (P)", said(rates.gradient_bytes / 1e6)],
    ]
    caption = (
        f"Measured: one worker, {config.arch} at full size, {config.queries} queries, "
        f"{config.precision}, on {device_name(config.device)}; checkpoints written to "
        f"{config.storage or 'a folder of this machine'}, shards read from {config.data}, where "
        "the system may hold them in memory."
    )
    return Table(["one worker", "value"], rows, caption)


def used(rates: Rates) -> float:
    """Bytes of shards whose images a second of training takes."""
    return rates.data_bytes / rates.rows * rates.batch / rates.step_s


def work(scales: list[Scale]) -> Table:
    """Steps and epochs."""
    heading = ["GPUs (N)", "nodes (M)", "images in a step", "samples/s", "steps an epoch",
               "s an epoch"]  # fmt: skip
    rows = [
        [str(s.gpus), str(s.nodes), said(s.step_images), said(s.samples_per_s),
         said(s.epoch_steps), said(s.epoch_s)]
        for s in scales
    ]  # fmt: skip
    caption = (
        "Each GPU takes b images in a step of t seconds, however many there are (perfect scaling): "
        "N b images in a step, N b / t samples/s, R / (N b) steps and R t / (N b) s an epoch. NOT "
        "measured: the network, which the gradients cross in each step; workers that wait for the "
        "slowest; what a batch of N b does to learning."
    )
    many = [s.gpus for s in scales if s.epoch_steps < 1]
    if many:
        caption += f" With {listed(many)} GPUs a step has more images than there are to train on."
    return Table(heading, rows, caption)


def reading(scales: list[Scale]) -> Table:
    """What is read from storage."""
    heading = ["GPUs (N)", "shards a node reads", "MB a node reads", "MB/s each GPU",
               "MB/s in all"]  # fmt: skip
    rows = [
        [str(s.gpus), said(s.node_shards), said(s.node_bytes / 1e6),
         said(s.gpu_bytes_per_s / 1e6), said(s.all_bytes_per_s / 1e6)]
        for s in scales
    ]  # fmt: skip
    rates = scales[0].rates
    how = (
        "all S, before the first step: they fit on the GPU"
        if rates.resident
        else "S (1 - (1 - 1/M)^(R/S)), those with a row of its share, which are rows at random"
    )
    caption = (
        f"Of the first epoch. A node reads {how}; each once for all of its GPUs where they are in "
        "S3 (it keeps them on its disk), so that later epochs read nothing from there. MB/s: what "
        "a node reads over its GPUs and the seconds of an epoch; in all: M nodes."
    )
    many = [s.gpus for s in scales if s.gpus > rates.shards]
    if many:
        caption += (
            f" With {listed(many)} GPUs there are fewer shards ({rates.shards}) than workers: no "
            "worker is without work, since rows are shared out and not shards, and a shard is read "
            "by every node that has a row of it."
        )
    return Table(heading, rows, caption)


def talking(scales: list[Scale]) -> Table:
    """Gradients and checkpoints."""
    heading = ["GPUs (N)", "MB a step and GPU", "Gbit/s to hide them", "checkpoints, GB/h",
               "waiting for them, %"]  # fmt: skip
    rows = [
        [str(s.gpus), said(s.all_reduce_bytes / 1e6), said(s.network_bits_per_s / 1e9),
         said(s.checkpoint_bytes_per_hour / 1e9), said(100 * s.checkpoint_share)]
        for s in scales
    ]  # fmt: skip
    caption = (
        "Gradients in a ring: 2 (N - 1) / N P bytes that each GPU sends and receives in a step; "
        "hidden by a network of 8 times that over t, if they are sent all the while, which is "
        "the least: DDP sends in the backward pass. A ring that enters each node once asks as "
        f"much of the node. A checkpoint every {scales[0].eval_every} steps: 3600 C / "
        f"({scales[0].eval_every} t) bytes an hour, written by one worker while all wait: w / "
        f"({scales[0].eval_every} t + w) of the time, without validation."
    )
    return Table(heading, rows, caption)


def sweep(scales: list[Scale]) -> Table:
    """A search over the same data."""
    rows = [[str(s.gpus), said(s.sweep_gpu_hours), said(s.sweep_hours)] for s in scales]
    one = scales[0]
    caption = (
        f"{one.trials} trials of {one.epochs} epochs, none ended early, each on one GPU: "
        f"n e R t / (3600 b) GPU-hours, in ceil(n / N) rounds of e R t / (3600 b) hours."
    )
    return Table(["GPUs (N)", "GPU-hours of a sweep", "hours"], rows, caption)


def listed(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers)
