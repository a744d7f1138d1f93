"""Completing images: every sampler, at growing sizes, from the same known pixels."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mambaflow.benchmarks.bench import BenchmarkConfig, Work, race, random_batch
from mambaflow.config import ARCHITECTURES
from mambaflow.data.batches import PixelBatch
from mambaflow.flow.samplers import SOLVERS, CountedVelocity, Solver, times_for
from mambaflow.models.velocity_field import ConditionedField, VelocityField
from mambaflow.report.tables import Table

# A fifth of 32 x 32, at every size: to read the known pixels costs the same.
KNOWN = 204


def solvers(steps: int) -> dict[str, Callable[[ConditionedField], Tensor]]:
    """Every sampler of the registry at its own settings, by what the table calls it."""
    times = times_for("uniform", steps)
    return {_title(s, steps): partial(_solve, s, times) for s in SOLVERS.values()}


def _title(solver: Solver, steps: int) -> str:
    return f"{solver.title}, {steps} steps" if solver.takes_times else solver.title


def _solve(solver: Solver, times: Tensor, field: ConditionedField) -> Tensor:
    # With the drawing of the noise, which costs more where it has a law of its own.
    return solver(field, field.noise(torch.randn), times, lambda step: field.noise(torch.randn))


def measure(config: BenchmarkConfig) -> list[Table]:
    """Seconds a batch and images a second; a batch has about as many points at every size."""
    model = VelocityField(ARCHITECTURES[config.arch]).to(config.device).eval()
    return [_at_size(config, model, size) for size in config.sizes]


def _at_size(config: BenchmarkConfig, model: VelocityField, size: int) -> Table:
    # As many points in a batch as `batch_size` images of 32 x 32 have.
    images = max(1, config.batch_size * 32 * 32 // size**2)
    queries = size**2 - KNOWN * (size == 32)  # a larger image is asked for whole
    batch = random_batch(replace(config, batch_size=images), queries, KNOWN)
    ways = solvers(config.steps)
    rivals: dict[str, Work] = {
        name: partial(_complete, model, batch, solve) for name, solve in ways.items()
    }
    with torch.no_grad():
        times = race(rivals, config.repeats, config.device)
    rows = [[k, f"{calls(ways[k])}", f"{v:.3f}", f"{images / v:.3g}"] for k, v in times.items()]
    caption = f"{config.arch}, {size} x {size}, {images} images at once, {queries} points each"
    return Table(["sampler", "calls", "s", "images/s"], rows, caption)


def _complete(
    model: VelocityField, batch: PixelBatch, solve: Callable[[ConditionedField], Tensor]
) -> Tensor:
    # With the reading of the known pixels, which a user pays once an image.
    return solve(model.condition(batch))


def calls(solve: Callable[[ConditionedField], Tensor]) -> int:
    """How often a sampler asks for the velocity."""
    # Counted on a velocity that costs nothing: samplers choose their calls without looking at it.
    counted = CountedVelocity(lambda x, t: torch.zeros_like(x))
    solve(ConditionedField(counted, None, lambda normal, finest: normal(1, 1, 3)))
    return counted.calls
