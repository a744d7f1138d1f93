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
from mambaflow.models.velocity_field import Velocity, VelocityField
from mambaflow.report.tables import Table

# A fifth of 32 x 32, at every size: to read the known pixels costs the same.
KNOWN = 204


def solvers(noise: Tensor, steps: int) -> dict[str, Callable[[Velocity], Tensor]]:
    """Every sampler of the registry at its own settings, by what the table calls it."""
    times = times_for("uniform", steps)
    return {_title(s, steps): partial(_solve, s, noise, times) for s in SOLVERS.values()}


def _title(solver: Solver, steps: int) -> str:
    return f"{solver.title}, {steps} steps" if solver.takes_times else solver.title


def _solve(solver: Solver, noise: Tensor, times: Tensor, velocity: Velocity) -> Tensor:
    return solver(velocity, noise, times, lambda step: torch.randn_like(noise))


def measure(config: BenchmarkConfig) -> list[Table]:
    """Seconds a batch and images a second; a batch has about as many points at every size."""
    model = VelocityField(ARCHITECTURES[config.arch]).to(config.device).eval()
    return [_at_size(config, model, size) for size in config.sizes]


def _at_size(config: BenchmarkConfig, model: VelocityField, size: int) -> Table:
    # As many points in a batch as `batch_size` images of 32 x 32 have.
    images = max(1, config.batch_size * 32 * 32 // size**2)
    queries = size**2 - KNOWN * (size == 32)  # a larger image is asked for whole
    batch = random_batch(replace(config, batch_size=images), queries, KNOWN)
    ways = solvers(torch.randn_like(batch.query_rgb), config.steps)
    rivals: dict[str, Work] = {
        name: partial(_complete, model, batch, solve) for name, solve in ways.items()
    }
    with torch.no_grad():
        times = race(rivals, config.repeats, config.device)
    rows = [[k, f"{calls(ways[k])}", f"{v:.3f}", f"{images / v:.3g}"] for k, v in times.items()]
    caption = f"{config.arch}, {size} x {size}, {images} images at once, {queries} points each"
    return Table(["sampler", "calls", "s", "images/s"], rows, caption)


def _complete(
    model: VelocityField, batch: PixelBatch, solve: Callable[[Velocity], Tensor]
) -> Tensor:
    # With the reading of the known pixels, which a user pays once an image.
    return solve(model.condition(batch))


def calls(solve: Callable[[Velocity], Tensor]) -> int:
    """How often a sampler asks for the velocity."""
    # Counted on a velocity that costs nothing: samplers choose their calls without looking at it.
    counted = CountedVelocity(lambda x, t: torch.zeros_like(x))
    solve(counted)
    return counted.calls
