"""Whether samples keep their law on a grid finer than any truth."""

import math
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from mambaflow.evaluation.sums import Sums

# How far the unknown pixels of an image are from the nearest known one: with a fifth known, 99 % of
# them at one of these, in pixels.
DISTANCES = (1.0, math.sqrt(2), 2.0, math.sqrt(5), math.sqrt(8))
# Of a distance, in pixels, on either side: wide enough for two kinds of places on any finer grid.
NEAR = 0.22


@dataclass(frozen=True)
class _Line(Sums):
    """Sums for the height of a straight line through points at x = 0."""

    count: int = 0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    @property
    def height(self) -> float:
        if not self.count:
            return math.nan
        spread = self.xx - self.x**2 / self.count
        # Points at one x have no slope.
        slope = (self.xy - self.x * self.y / self.count) / spread if spread > 1e-9 else 0.0
        return (self.y - slope * self.x) / self.count


@dataclass(frozen=True)
class _AtDistance(Sums):
    """Squares of sample - mean around a distance, and of truth - mean at it."""

    drawn: _Line = field(default_factory=_Line)
    pixels: int = 0
    truth: float = 0.0


@dataclass(frozen=True)
class FineSpread(Sums):
    """The spread of samples on a finer grid, beside the truth of the coarse one.

    A place varies the more the farther it is from known pixels, and the places of a finer grid lie
    at other distances than pixels do. So squares are compared distance by distance: those of the
    finer grid by a straight line over places up to NEAR from it (local linear regression; Fan &
    Gijbels 1996), weighted as the coarse grid has them. Right within 3 %: places at one distance
    have other known pixels around them on a finer grid.
    """

    at_1: _AtDistance = field(default_factory=_AtDistance)
    at_2: _AtDistance = field(default_factory=_AtDistance)
    at_3: _AtDistance = field(default_factory=_AtDistance)
    at_4: _AtDistance = field(default_factory=_AtDistance)
    at_5: _AtDistance = field(default_factory=_AtDistance)

    def add(
        self,
        drawn: Float[Tensor, "n 3"],
        distance: Float[Tensor, " n"],
        real: Float[Tensor, "m 3"],
        real_distance: Float[Tensor, " m"],
    ) -> "FineSpread":
        """With one image counted in; no colours are clipped.

        Args:
            drawn: sample - mean at the places of the finer grid.
            distance: of each of them to the nearest known pixel, in pixels of the coarse grid.
            real, real_distance: truth - mean, and the same, at the pixels of the coarse grid.
        """
        squares, real_squares = drawn.double().square().sum(-1), real.double().square().sum(-1)
        found = []
        for target in DISTANCES:
            off = distance.double() - target
            near, at = off.abs() < NEAR, (real_distance - target).abs() < 1e-3
            x, y = off[near], squares[near]
            sums = (x.sum(), x.square().sum(), y.sum(), (x * y).sum())
            line = _Line(len(x), *(value.item() for value in sums))
            found.append(_AtDistance(line, int(at.sum()), real_squares[at].sum().item()))
        return self + FineSpread(*found)

    def report(self) -> dict[str, float]:
        """`spread_fine` (right: 1; nan without a pixel of the truth)."""
        parts = [getattr(self, f"at_{i}") for i in range(1, len(DISTANCES) + 1)]
        both = [part for part in parts if part.pixels and part.drawn.count]
        real = sum(part.truth for part in both)
        drawn = sum(part.pixels * part.drawn.height for part in both)
        return {"spread_fine": drawn / real if real > 0 else math.nan}
