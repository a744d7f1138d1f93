"""Attention against torch's own kernel and the plain products, as training and sampling ask it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mambaflow.benchmarks.bench import BenchmarkConfig, Work, against, device_name, race
from mambaflow.config import ARCHITECTURES
from mambaflow.models.attention import attend, fused, plain
from mambaflow.report.tables import Table

WIDENED_BY = 3  # dimensions that place the window, and colours that it reads: a tenth of a head
LONG = 4096  # points that attend to one another where an image of 64 x 64 is sampled


RIVALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": attend, "torch's fused": fused, "plain products": plain,
}  # fmt: skip


def measure(config: BenchmarkConfig) -> list[Table]:
    """A training batch, forward and with gradients; and one image's points among themselves."""
    batch, many = (
        _inputs(config, b, n) for b, n in ((config.batch_size, config.queries), (1, LONG))
    )
    # The gradient that comes from above, made once: the clock is on the rivals alone. A value is as
    # wide as a query here, and so is the output.
    slope = torch.randn_like(batch[0])
    both: dict[str, Work] = {
        name: partial(_through, rival, batch, slope) for name, rival in RIVALS.items()
    }
    # The same inputs, which want gradients, are raced without: sampling keeps nothing.
    with torch.no_grad():
        tables = [_raced("forward", x, config, _forward(x)) for x in (batch, many)]
    return [*tables, _raced("forward and backward", batch, config, both)]


def _inputs(config: BenchmarkConfig, b: int, n: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = ARCHITECTURES[config.arch]
    shape = (b, model.num_heads, n, model.d_model // model.num_heads + WIDENED_BY)
    # Query, key and value; the query is not scaled, which changes no rival's work.
    return [torch.randn(shape, device=config.device, requires_grad=True) for _ in range(3)]


def _forward(inputs: list[Tensor]) -> dict[str, Work]:
    return {name: partial(rival, *inputs) for name, rival in RIVALS.items()}


def _through(rival: Callable[..., Tensor], inputs: list[Tensor], slope: Tensor) -> object:
    return torch.autograd.grad(rival(*inputs), inputs, slope)


def _raced(name: str, inputs: list[Tensor], config: BenchmarkConfig, works: dict) -> Table:
    times = race(works, config.repeats, config.device)
    b, heads, n, width = inputs[0].shape
    caption = f"{name}; b {b}, {heads} heads, {n} queries and keys, width {width}"
    return Table(
        ["attention", "ms", "/ ours"],
        against(times, "ours"),
        f"{caption}; {device_name(config.device)}",
    )
