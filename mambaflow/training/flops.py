"""FLOPs of training: of the matrix products and attentions of a step, forward and backward.

Counted by torch as it runs the network, but of one image with a pixel or three. Every product is by
one weight, or among pixels: FLOPs are proportional to the batch, and of an image a polynomial of
the second degree in its known pixels and its queries, which six counts give exactly, at any size.

What is counted are the products of the definition: in transforms (see kernels.transforms) the
network is composed of torch's own operations, which torch knows, whatever kernels are built here.
Neither device nor precision is asked. Not counted: what is computed again in the backward pass; the
scan and its convolution, of which each state and channel keeps to itself; the drawing of noise;
the optimiser.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch.autograd import forward_ad

from mambaflow.checks import require
from mambaflow.config import ModelConfig, TrainConfig
from mambaflow.data.batches import PixelBatch
from mambaflow.models.mamba import Mamba
from mambaflow.models.velocity_field import VelocityField
from mambaflow.training.objective import Objective

# Known pixels and queries of the counts: as many as the polynomial has coefficients.
COUNTED = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3))


def step_flops(model: ModelConfig, train: TrainConfig, known: int, target: int) -> int:
    """FLOPs of one step of the whole batch, the mean over the numbers of queries that are drawn.

    A second or two at first, whatever the sizes; a model that was counted before is not again.

    Args:
        known: known pixels of an image.
        target: queries of an image where `max_queries` is 0, as many as shards hold targets.

    Raises:
        ValueError: no known pixels, or no targets.
    """
    of_image, most = image_flops(model), train.max_queries or target
    # As `Batches.queries` draws them, each as often as any other.
    numbers = range(train.min_queries or most, most + 1)
    # The sum over all numbers is exact; the mean may leave a fraction of one FLOP.
    return train.batch_size * sum(of_image(known, n) for n in numbers) // len(numbers)


@cache
def image_flops(model: ModelConfig) -> Callable[[int, int], int]:
    """FLOPs of one image in a step, as a function of its known pixels and its queries."""
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
        objective = Objective(VelocityField(model), TrainConfig())
        counts = {(k, n): counted(objective, k, n) for k, n in COUNTED}

    def flops(known: int, queries: int) -> int:
        for name, value in (("known", known), ("queries", queries)):
            require(value >= 1, f"{name} (={value}) must be positive; use 1 or more pixels")
        return _extended(counts, known, queries)

    return flops


def counted(objective: Objective, known: int, queries: int, images: int = 1) -> int:
    """FLOPs of a batch of made-up pixels, by running it: in time and memory that of all states."""
    from torch.utils.flop_counter import FlopCounterMode

    (known_xy, known_rgb), (xy, rgb) = (
        [torch.rand(images, n, numbers) for numbers in (2, 3)] for n in (known, queries)
    )
    batch = PixelBatch(known_xy, known_rgb, xy, rgb, torch.arange(images))
    draws = objective.draws(batch)
    # Nothing here has a tangent: the level only keeps our kernels out.
    with forward_ad.dual_level(), FlopCounterMode(display=False) as counter:
        objective(batch, *draws).backward()
    objective.zero_grad()
    return _products(counter.get_flop_counts(), objective)


def _products(counts: Mapping[str, Mapping], objective: Objective) -> int:
    """What is counted of each module's operations, by its name."""
    ours = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    blocks = [name for name, module in objective.named_modules() if isinstance(module, Mamba)]
    # torch sums the scan's states by a product for each token, as no kernel does. It is the only
    # one of a block that is not by a weight.
    scans = [counts[f"Objective.{name}"].get(torch.ops.aten.bmm, 0) for name in blocks]
    return sum(counts["Global"].get(op, 0) for op in ours) - sum(scans)


def _extended(counts: Mapping[tuple[int, int], int], known: int, queries: int) -> int:
    """The polynomial through the counts, by Newton's forward differences: whole numbers."""
    f, i, j = counts, known - 1, queries - 1
    first = i * (f[2, 1] - f[1, 1]) + j * (f[1, 2] - f[1, 1])
    second = (
        math.comb(i, 2) * (f[3, 1] - 2 * f[2, 1] + f[1, 1])
        + i * j * (f[2, 2] - f[2, 1] - f[1, 2] + f[1, 1])
        + math.comb(j, 2) * (f[1, 3] - 2 * f[1, 2] + f[1, 1])
    )
    return f[1, 1] + first + second
