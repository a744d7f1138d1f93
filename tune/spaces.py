"""What a sweep may choose. A space is a function of the base configuration, so that no combination
can be drawn that is no run.

    python tune/sweep.py --space size
    python tune/sweep.py --space my_spaces.py:heads      a function of your own, of the same kind
"""

from collections.abc import Callable
from dataclasses import replace

from mambaflow.config import ARCHITECTURES, RunConfig, mission
from mambaflow.search.space import (
    Choice,
    Dimension,
    Listed,
    LogUniform,
    Product,
    Space,
    Values,
    values_of,
    with_values,
)

FACTORS = (0.5, 1.0, 1.5)


def size(run: RunConfig) -> Space:
    """Width and depth, half, as they are and half as much again, and where there is a perceiver
    one to three iterations of it."""
    model = run.model
    # Widths are of whole heads; depths, of a layer forward and one backward.
    pair = 2 if model.bidirectional else 1
    space: dict[str, Dimension] = {
        "model.d_model": Choice(_multiples(model.d_model, model.num_heads)),
        "model.num_layers": Choice(_multiples(model.num_layers, pair)),
    }
    if model.readout == "perceiver":
        space["model.perceiver_iterations"] = Choice([1, 2, 3])
    return Product(space)


def _multiples(value: int, of: int) -> list[int]:
    """`value` by each factor, as the nearest multiple above 0."""
    return sorted({max(of, round(value * factor / of) * of) for factor in FACTORS})


def optim(run: RunConfig) -> Space:
    """Learning rate, average of the weights, times of the loss, order of the tokens."""
    shares = [0.1, 0.25, 0.5]
    return Product(
        {
            "train.lr": LogUniform(run.train.lr / 5, run.train.lr * 5),
            "train.ema_decay": Choice([0.99, 0.995, 0.999]),
            "train.time_law": Choice(["uniform", "logit_normal"]),
            "train.share_at_zero": Choice(shares),
            "model.curve": Choice(["raster", "hilbert"]),
        }
    )


# From V1 to V2 field by field, in an order in which every stage is a run: the scan makes room for
# a read-out that hears the time, and for a fill of the known pixels alone.
PATH: dict[str, str] = {
    "curve": "Hilbert curve",
    "bidirectional": "both directions",
    "readout": "perceiver",
    "query_attention": "query self-attention",
    "scan": "known pixels alone scanned",
    "modulation": "adaLN",
    "windows": "windows",
    "local_linear": "local planes",
    "weighting": "loss on the data",
    "start": "law of the residual",
}


def ablation(run: RunConfig) -> Space:
    """V1, and at each stage one field more of V2, until it is V2; at the base's own sizes."""
    first, last = (_at_size(arch, run) for arch in ("v1", "v2"))
    # Without self-attention, which is a stage of its own.
    first = with_values(first, {"model.query_attention": False})
    fields = [f"{'train' if name == 'weighting' else 'model'}.{name}" for name in PATH]
    values = values_of(first, fields)
    stages: dict[str, Values] = {"V1": values}
    for field, told in zip(fields, PATH.values(), strict=True):
        values = values | values_of(last, [field])
        stages[f"+ {told}"] = values
    return Listed(stages)


def _at_size(arch: str, run: RunConfig) -> RunConfig:
    model, ours = ARCHITECTURES[arch], run.model
    model = replace(
        model, d_model=ours.d_model, num_layers=ours.num_layers, num_heads=ours.num_heads
    )
    # The weighting that goes with the architecture is the recipe's.
    weighting = mission(arch).train.weighting
    return replace(run, model=model, train=replace(run.train, weighting=weighting))


SPACES: dict[str, Callable[[RunConfig], Space]] = {
    "size": size,
    "optim": optim,
    "ablation": ablation,
}
