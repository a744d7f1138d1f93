"""Whether samples keep their law on a grid finer than any truth."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambaflow.evaluation.metrics import Moments, Sums


def far(xy: Float[Tensor, "n 2"], known_xy: Float[Tensor, "k 2"], size: int) -> Bool[Tensor, " n"]:
    """Which places are a pixel of an image of `size` or more from every known one."""
    # A hair less than a pixel: neighbours in a row are exactly one apart, but for rounding.
    return torch.cdist(xy[None], known_xy[None])[0].amin(-1) >= 0.99 / size


@dataclass(frozen=True)
class FineSpread(Sums):
    """Spread and coherence of samples on a finer grid, over places as far from known pixels as
    those of the coarse grid that the truth is compared at.

    A finer grid has no truth, and places nearer to known pixels vary less: so both sides look at
    places a coarse pixel or more away. Neighbours are one coarse pixel apart, as on that grid.
    """

    drawn: Moments = field(default_factory=Moments)
    truth: Moments = field(default_factory=Moments)
    products: float = 0.0
    squares: float = 0.0

    def add(
        self,
        drawn: Float[Tensor, "s s 3"],
        where: Bool[Tensor, "s s"],
        step: int,
        real: Float[Tensor, "n 3"],
    ) -> "FineSpread":
        """With one image counted in; no colours are clipped.

        Args:
            drawn: sample - mean, on the fine grid.
            where: which of its places are far from known pixels.
            step: pixels of the fine grid in one of the coarse.
            real: truth - mean at such places of the coarse grid.
        """
        products = squares = 0.0
        wide, last = drawn.double(), len(drawn) - step
        for axis in (0, 1):
            a, b = wide.narrow(axis, 0, last), wide.narrow(axis, step, last)
            both = where.narrow(axis, 0, last) & where.narrow(axis, step, last)
            products += float((a * b)[both].sum())
            # Both ways round: half of the sum of both squares.
            squares += float((a.square() + b.square())[both].sum() / 2)
        inside = self.drawn.add(drawn[where].flatten())
        return FineSpread(
            inside,
            self.truth.add(real.flatten()),
            self.products + products,
            self.squares + squares,
        )

    def report(self) -> dict[str, float]:
        """`spread_fine` (right: 1) and `coherence_fine` (right: the truth's coherence at its own
        size, of places as far from known pixels)."""
        real = self.truth.variance
        return {
            "spread_fine": self.drawn.variance / real if real > 0 else math.nan,
            "coherence_fine": self.products / self.squares if self.squares else math.nan,
        }
