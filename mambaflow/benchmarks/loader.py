"""Batches from shards against the per-item way, and against what training takes."""

from collections.abc import Iterator
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mambaflow.benchmarks.bench import (
    BenchmarkConfig,
    Fixed,
    Work,
    race,
    random_batch,
    step_config,
)
from mambaflow.config import ARCHITECTURES, TrainConfig
from mambaflow.data.batches import Batches, Layout
from mambaflow.data.pixels import coordinates
from mambaflow.data.shard_reader import ShardSet
from mambaflow.report.tables import Table
from mambaflow.training.loop import TrainState, fit

MASKS: tuple[Literal["strict", "fresh"], ...] = ("strict", "fresh")
LOADED = 64  # batches in one round: those of an epoch of the sample


def per_item(shards: ShardSet, queries: int, batch_size: int) -> Iterator[object]:
    """The usual way: torchvision's CIFAR10 items, a Dataset that picks each one's pixels, and a
    DataLoader with two workers; epochs without end."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import ToTensor

    # All images in memory beforehand, as CIFAR10 has them: what is compared is making batches.
    rows = shards.rows(np.arange(len(shards)))
    if rows.images is None:
        raise ValueError(f"data (={shards.storage.uri}) must be staged with --full-images")
    known, size = shards.spec.known, shards.spec.size
    whole, labels = rows.images.reshape(-1, size, size, 3), rows.labels.tolist()

    class Images(CIFAR10):
        def __init__(self) -> None:  # its items, without its download
            self.data, self.targets = whole, labels
            self.transform, self.target_transform = ToTensor(), None

    class Sparse(Dataset):
        images = Images()

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            image, _ = self.images[i]
            # A mask that is the same whenever the image comes, as a Dataset makes one: by a
            # generator that is seeded anew for each item.
            chosen = torch.from_numpy(np.random.RandomState(42 + i).permutation(size * size))
            xy, rgb = coordinates(chosen, size), image.flatten(1).t()[chosen]
            return xy[:known], rgb[:known], xy[known:][:queries], rgb[known:][:queries]

    # Workers that stay: each that starts shares all memory of this process until it is written to.
    loader = DataLoader(Sparse(), batch_size, shuffle=True, num_workers=2, drop_last=True,
                        persistent_workers=True)  # fmt: skip
    while True:
        yield from loader


def reading(batches: Batches) -> Work:
    """The next few batches, again and again."""
    # Ever later steps, over many epochs, as training asks for them.
    step = count()
    return lambda: [batches[next(step)] for _ in range(LOADED)]


def measure(config: BenchmarkConfig) -> list[Table]:
    """Batches from staged shards against the per-item way, and against what training takes."""
    shards = ShardSet(config.data, "train")
    layout, b = Layout.of(shards.spec, ARCHITECTURES[config.arch]), config.batch_size
    usual = per_item(shards, config.queries, b)
    state = TrainState(ARCHITECTURES[config.arch], step_config(config), torch.device(config.device))
    # Of a batch that is at hand: what training could take, were there no loading.
    training = fit(state, Fixed(random_batch(config, config.queries)), step_config(config), 10**9)
    rivals: dict[str, Work] = {"training step": lambda: next(training)}
    # Made in this thread, without a Prefetcher, as training on CPU does.
    for masks in MASKS:
        batches = Batches(shards, layout, TrainConfig(batch_size=b, masks=masks))
        rivals[f"batches, {masks} masks"] = reading(batches)
    # Its two workers go on while others have their turn, and have made four batches, two each, when
    # its own begins: four of LOADED, in its favour.
    rivals["CIFAR10 + Dataset + DataLoader, 2 workers"] = lambda: [
        next(usual) for _ in range(LOADED)
    ]
    times = race(rivals, config.repeats, config.device)
    # A turn is one step of training, and LOADED batches of the others.
    rates = {k: b * (1 if k == "training step" else LOADED) / v for k, v in times.items()}
    rows = [[k, f"{v:,.0f}", f"{v / rates['training step']:,.0f}"] for k, v in rates.items()]
    heading = ["what", "samples/s", "/ training"]
    return [
        Table(heading, rows, f"{config.arch}, batch {b}, {len(shards):,} images of {config.data}")
    ]
