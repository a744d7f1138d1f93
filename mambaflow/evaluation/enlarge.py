"""One field of colours, painted at several sizes from the same known pixels and the same noise."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mambaflow.checks import require
from mambaflow.data.batches import PixelBatch
from mambaflow.evaluation.complete import EvalSet, Images, numbers
from mambaflow.flow.samplers import Solver, times_for
from mambaflow.models.velocity_field import ConditionedField, VelocityField

LARGEST = 1024  # pixels on a side


def enlarge(
    model: VelocityField,
    eval_set: EvalSet,
    sizes: Sequence[int],
    solver: Solver,
    steps: int = 1,
    *,
    grid: str = "uniform",
    **settings: float | int,
) -> dict[int, Images]:
    """Images in [0, 1] of every size, each painted anew at its own pixel centres.

    Nothing is scaled up: the model is asked at finer places. All sizes see one noise field, drawn
    for the largest (`start="process"`; white noise has nothing between its pixels), so that where
    pixel centres of two sizes coincide, as those of 32 and 96 do, they start from the same noise,
    and where they lie close by, from nearly the same. Known pixels are not copied: they have no
    size of their own in a finer image.

    Args:
        sizes: pixels on a side, each at most LARGEST.
        solver: of the registry flow.samplers.SOLVERS.
        steps: intervals of the grid of times.
        settings: of the solver, such as its temperature.
    """
    bad = [size for size in sizes if not 1 <= size <= LARGEST]
    require(
        len(sizes) > 0 and not bad,
        f"sizes (={list(sizes)}) must be one or more, each in [1, {LARGEST}]; use [32, 64, 128]",
    )
    finest = max(sizes)

    def at(size: int) -> Images:
        found = paint(
            model, eval_set, size, finest, solver, steps, grid=grid, sample=0, **settings
        )  # fmt: skip
        return found.clamp(0, 1)

    return {size: at(size) for size in sizes}


def paint(
    model: VelocityField,
    eval_set: EvalSet,
    size: int,
    finest: int,
    solver: Solver,
    steps: int = 1,
    *,
    grid: str = "uniform",
    sample: int = 0,
    **settings: float | int,
) -> Images:
    """Images of one size on the scale of [0, 1], with colours beyond it as they were answered.

    Args:
        finest: the largest size that shows the same noise.
        sample: of several of each image, which.
    """
    times, found = times_for(grid, steps), []
    with torch.no_grad():
        for batch in _asked(eval_set, size):  # one by one: an image of 256 x 256 is large enough
            field = model.condition(batch.to(next(model.parameters()).device))
            draw = partial(_noise, field, batch, finest, sample)
            rgb = solver(field, draw(0), times, partial(_later, draw), **settings)
            found.append(eval_set.layout.unclipped(rgb.cpu()).view(size, size, 3))
    return torch.stack(found)


def _asked(eval_set: EvalSet, size: int) -> Iterator[PixelBatch]:
    """Each image's known pixels, and all places of a grid as its queries."""
    places = replace(eval_set.layout, size=size).xy(torch.arange(size * size)[None])
    for i in range(len(eval_set)):
        batch, _ = eval_set[i : i + 1].batch()
        yield replace(batch, query_xy=places, query_rgb=torch.zeros(1, size * size, 3))


def _noise(
    field: ConditionedField, batch: PixelBatch, finest: int, sample: int, stream: int
) -> Tensor:
    return field.noise(partial(numbers, batch.number, stream, sample=sample), finest)


def _later(draw: Callable[[int], Tensor], step: int) -> Tensor:
    # Stream 0 is where the path starts.
    return draw(step + 1)
