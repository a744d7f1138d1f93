"""What a sweep may choose. A space is a function from the base configuration, so that no
combination can be drawn that is no run.

    python tune/sweep.py --space size
    python tune/sweep.py --space my_spaces.py:heads      a function of your own, of the same kind
"""

from collections.abc import Callable
from dataclasses import replace

from mambaflow.config import ARCHITECTURES, RunConfig
from mambaflow.search.space import Choice, Listed, Product, Space, Values


def size(run: RunConfig) -> Space:
    """Width and depth, and for V2 the iterations of its perceiver, around the base's own."""
    model = run.model
    # Widths are whole heads, and depths whole pairs of layers, forward and backward.
    heads, pair = model.num_heads, 2 if model.bidirectional else 1
    widths = {max(heads, round(model.d_model * f / heads) * heads) for f in (0.5, 1, 1.5)}
    depths = {max(pair, round(model.num_layers * f / pair) * pair) for f in (0.5, 1, 1.5)}
    space = {
        "model.d_model": Choice(sorted(widths)),
        "model.num_layers": Choice(sorted(depths)),
    }
    # A single cross-attention, V1's, has no iterations.
    if model.readout == "perceiver":
        space["model.perceiver_iterations"] = Choice([1, 2, 3])
    return Product(space)


def optim(run: RunConfig) -> Space:
    """Learning rate, average, law of the times, share at t = 0, order of the tokens."""
    dimensions = {
        "train.lr": _around(run.train.lr, 5),
        "train.ema_decay": Choice([0.99, 0.995, 0.999]),
        "train.time_law": Choice(["uniform", "logit_normal"]),
        "train.share_at_zero": Choice([0.1, 0.25, 0.5]),
        "model.curve": Choice(["raster", "hilbert"]),
    }
    return Product(dimensions)


def _around(value: float, factor: float):
    from mambaflow.search.space import LogUniform

    return LogUniform(value / factor, value * factor)


# From V1 to V2, one idea at a time, in an order in which every stage is a run: fields that go only
# together go at once.
PATH: dict[str, tuple[str, ...]] = {
    "V2's size": ("d_model", "num_layers"),
    "both directions": ("bidirectional",),
    "known pixels alone in the scan": ("scan",),
    "Hilbert curve": ("curve",),
    "perceiver": ("readout",),
    "adaLN": ("modulation",),
    "windows": ("windows",),
    "local planes": ("local_linear",),
    "law of the residual": ("start",),
}


def ablation(run: RunConfig) -> Space:
    """V1, and V1 with one idea of V2 more at each stage, until it is V2; at the base's sizes."""
    v1, v2 = ARCHITECTURES["v1"], ARCHITECTURES["v2"]
    stages: dict[str, Values] = {"V1": {}}
    return Listed(stages)


SPACES: dict[str, Callable[[RunConfig], Space]] = {
    "size": size,
    "optim": optim,
    "ablation": ablation,
}
