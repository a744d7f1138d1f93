"""Whether samples keep their law: asked at other densities, and in other numbers of calls."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambaflow.benchmarks.bench import BenchmarkConfig
from mambaflow.data.batches import Layout, PixelBatch
from mambaflow.data.pixels import grid
from mambaflow.data.random_bits import uniform
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.complete import CHUNK, EvalSet, numbers
from mambaflow.evaluation.metrics import Calibration, Moments, psnr
from mambaflow.flow.samplers import SOLVERS, CountedVelocity, Solver, times_for
from mambaflow.models.velocity_field import ConditionedField, VelocityField
from mambaflow.models.weights import load_model
from mambaflow.report.tables import Table

QUERIES = (150, 300, 500, 820)
# Solver and intervals: the law alone, two ways to ten calls, and as good as exact.
WAYS = (("exponential", 1), ("exponential", 10), ("heun", 5), ("exponential", 100))


@dataclass
class Found:
    """What one way of drawing samples came to."""

    law: Calibration = field(default_factory=Calibration)
    mean: Moments = field(default_factory=Moments)
    sample: Moments = field(default_factory=Moments)
    calls: int = 0


def measure(config: BenchmarkConfig) -> list[Table]:
    """Spread, coherence and PSNR of samples by the number of pixels asked; and of a finer grid."""
    model, info = load_model(config.checkpoint, device=config.device)
    split = ShardSet(config.data, "test")
    held_out = EvalSet.read(split, Layout.of(split.spec, model.config), config.images)
    model.eval()
    with torch.no_grad():
        tables = [_by_queries(model, held_out), _finer(model, held_out)]
    where = f"{config.checkpoint} at step {info.step}, {len(held_out)} images, masks "
    return [replace(t, caption=f"{t.caption} {where}{held_out.mask_hash}.") for t in tables]


def _by_queries(model: VelocityField, held_out: EvalSet) -> Table:
    most = held_out.layout.size**2 - held_out.layout.known
    rows = [row for n in QUERIES if n <= most for row in _rows(model, held_out, n)]
    heading = ["queries", "sampler", "calls", "spread", "coherence", "truth's", "PSNR of mean",
               "PSNR of sample"]  # fmt: skip
    caption = "Over the unknown pixels asked, answers not clipped but for PSNR."
    return Table(heading, rows, caption)


def _rows(model: VelocityField, held_out: EvalSet, queries: int) -> Iterator[list[str]]:
    found = {way: Found() for way in WAYS}
    for chunk in _chunks(held_out):
        batch, others = _subset(chunk, queries)
        known = torch.ones_like(chunk.is_known).flatten(1).scatter(1, others, False)
        known = known.view(chunk.is_known.shape)
        ask = _ask(model, batch)
        mean = _solve(ask, batch, SOLVERS["mean"], 1)[0]
        best = chunk.unclipped(others, mean)
        for name, steps in WAYS:
            rgb, calls = _solve(ask, batch, SOLVERS[name], steps)
            _count(found[name, steps], chunk, chunk.unclipped(others, rgb), best, known)
            found[name, steps].calls = calls
    for (name, _), f in found.items():
        law = f.law.report()
        numbers_ = [law["spread"], law["coherence"], law["coherence_truth"], f.mean.mean,
                    f.sample.mean]  # fmt: skip
        yield [f"{queries}", SOLVERS[name].title, f"{f.calls}", *(f"{x:.2f}" for x in numbers_)]


def _count(
    found: Found, chunk: EvalSet, sample: Tensor, mean: Tensor, known: Bool[Tensor, "m h w"]
) -> None:
    found.law = found.law.add(sample, mean, chunk.truth, known)
    found.mean = found.mean.add(psnr(mean.clamp(0, 1), chunk.truth, ~known))
    found.sample = found.sample.add(psnr(sample.clamp(0, 1), chunk.truth, ~known))


@dataclass
class Fine:
    """Sums over a grid that has no truth."""

    drawn: Moments = field(default_factory=Moments)
    products: float = 0.0
    squares: float = 0.0
    calls: int = 0

    def add(self, rest: Float[Tensor, "s s 3"], where: Bool[Tensor, "s s"], step: int) -> None:
        """With an image's sample - mean counted in; neighbours are `step` places apart."""
        self.drawn = self.drawn.add(rest[where].flatten())
        last = len(rest) - step
        for axis in (0, 1):
            a, b = rest.narrow(axis, 0, last), rest.narrow(axis, step, last)
            both = where.narrow(axis, 0, last) & where.narrow(axis, step, last)
            self.products += float((a * b)[both].sum())
            self.squares += float((a.square() + b.square())[both].sum() / 2)


def _finer(model: VelocityField, held_out: EvalSet) -> Table:
    """A grid that has no truth, beside the truth of the coarse one at places as far from known
    pixels."""
    found, real = {way: Fine() for way in WAYS[:-1]}, Moments()
    coarse = held_out.layout.size
    size = 2 * coarse
    for chunk in _chunks(held_out, images=1):
        batch, _ = chunk.batch()
        mean = _solve(_ask(model, batch), batch, SOLVERS["mean"], 1)[0]
        real = real.add((batch.query_rgb - mean)[_far(batch, coarse)].flatten())
        fine = replace(batch, query_xy=grid(size)[None], query_rgb=torch.zeros(1, size**2, 3))
        ask, where = _ask(model, fine), _far(fine, coarse).view(size, size)
        mean = _solve(ask, fine, SOLVERS["mean"], 1)[0]
        for (name, steps), sums in found.items():
            rgb, sums.calls = _solve(ask, fine, SOLVERS[name], steps)
            sums.add((rgb - mean).view(size, size, 3), where, size // coarse)
    rows = [
        [SOLVERS[name].title, f"{sums.calls}", f"{sums.drawn.variance / real.variance:.2f}",
         f"{sums.products / sums.squares:.2f}"]
        for (name, _), sums in found.items()
    ]  # fmt: skip
    caption = (
        f"Asked at {size} x {size} instead: variance of sample - mean over that of truth - mean at "
        f"{coarse}, at places a pixel or more from a known one, and the correlation of places one "
        "such pixel apart."
    )
    return Table(["sampler", "calls", "spread", "coherence"], rows, caption)


def _far(batch: PixelBatch, size: int) -> Bool[Tensor, "b n"]:
    """Which queries are a pixel of `size` or more from every known one."""
    return torch.cdist(batch.query_xy, batch.known_xy).amin(-1) >= 0.99 / size


def _chunks(held_out: EvalSet, images: int = CHUNK) -> Iterator[EvalSet]:
    for first in range(0, len(held_out), images):
        yield held_out[first : first + images]


def _subset(chunk: EvalSet, queries: int) -> tuple[PixelBatch, Int[Tensor, "m n"]]:
    """Some of the unknown pixels, another choice for each image."""
    batch, others = chunk.batch()
    order = uniform(0, "density", queries, chunk.ids, others.shape[1]).argsort(-1)[:, :queries]
    wide = order[..., None]
    asked = {
        name: getattr(batch, name).gather(1, wide.expand(-1, -1, width))
        for name, width in (("query_xy", 2), ("query_rgb", 3))
    }
    return replace(batch, **asked), others.gather(1, order)


def _ask(model: VelocityField, batch: PixelBatch) -> ConditionedField:
    return model.condition(batch.to(next(model.parameters()).device))


def _solve(
    ask: ConditionedField, batch: PixelBatch, solver: Solver, steps: int
) -> tuple[Float[Tensor, "m n 3"], int]:
    """Colours, and the calls that they took; the same noise whatever the solver."""
    counted = CountedVelocity(ask)

    def draw(stream: int) -> Tensor:
        return ask.noise(partial(numbers, batch.number, stream))

    return solver(
        counted, draw(0), times_for("uniform", steps), lambda i: draw(i + 1)
    ), counted.calls
