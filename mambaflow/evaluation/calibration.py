"""Whether samples have the law of the truth around the posterior mean: spread and coherence.

Both are of the answer as the solver gave it, since clipping narrows a spread.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mambaflow.evaluation.scored_images import Images, Mask, Sextile, require_same_shape
from mambaflow.evaluation.sums import Moments, Sums

# A colour axis with less than this share of the widest one's variance is what rounding left.
NO_AXIS = 1e-9
SEXTILE_SPREADS = tuple(f"spread_{number}" for number in range(1, 7))  # from the calmest on
AXIS_SPREADS = tuple(f"spread_axis_{number}" for number in range(1, 4))  # from the widest on


@dataclass(frozen=True)
class _Neighbours(Sums):
    """Sums over pairs (a, b), each counted both ways round, for their correlation."""

    pairs: int = 0
    total: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, values: Images, where: Mask) -> "_Neighbours":
        sums = self
        # Pairs one above the other, then side by side.
        for axis in (1, 2):
            last = values.shape[axis] - 1
            # `where` holds for both of a pair.
            both = where.narrow(axis, 0, last) & where.narrow(axis, 1, last)
            a, b = values.narrow(axis, 0, last)[both], values.narrow(axis, 1, last)[both]
            # Both ways round a and b have one mean and one variance: halves of the sums over both.
            sums = sums + _Neighbours(
                a.numel(),
                (a + b).sum().item() / 2,
                (a.square() + b.square()).sum().item() / 2,
                (a * b).sum().item(),
            )
        return sums

    @property
    def correlation(self) -> float:
        if not self.pairs:
            return math.nan
        centre = self.total**2 / self.pairs
        variance = self.squares - centre
        # Rounding may leave a variance of equal values at zero or just below.
        return (self.products - centre) / variance if variance > 0 else math.nan


def _residuals(
    sample: Images, mean: Images, truth: Images, known: Mask
) -> tuple[Float[Tensor, "b h w 3"], Float[Tensor, "b h w 3"]]:
    """s - mu and x - mu of every pixel, in float64.

    Raises:
        ValueError: shapes that differ; an unknown pixel that is no number.
    """
    require_same_shape(sample=sample, mean=mean, truth=truth, known=known)
    centre = mean.double()
    drawn, real = sample.double() - centre, truth.double() - centre
    # One that is no number would spoil the sums over all images. Known pixels are copies, and
    # count for nothing.
    if not (drawn[~known].isfinite().all() and real[~known].isfinite().all()):
        raise ValueError("sample, mean and truth must be finite where known is False")
    return drawn, real


@dataclass(frozen=True)
class _Spread(Sums):
    """How wide samples lie beside the truth."""

    sample: Moments = field(default_factory=Moments)
    truth: Moments = field(default_factory=Moments)

    def add(self, drawn: Float[Tensor, " n"], real: Float[Tensor, " n"]) -> "_Spread":
        return _Spread(self.sample.add(drawn), self.truth.add(real))

    @property
    def ratio(self) -> float:
        drawn, real = self.sample.variance, self.truth.variance
        return drawn / real if real > 0 else math.nan


@dataclass(frozen=True)
class Calibration(Sums):
    """Whether samples have the law of the truth around the posterior mean, over unknown pixels.

    A true draw s and the truth x have the same law around mu. Give values that are not clipped:
    clipping narrows the spread. Completion carries them, as `answer` and `mean`.
    """

    sample: Moments = field(default_factory=Moments)
    truth: Moments = field(default_factory=Moments)
    sample_neighbours: _Neighbours = field(default_factory=_Neighbours)
    truth_neighbours: _Neighbours = field(default_factory=_Neighbours)

    def add(self, sample: Images, mean: Images, truth: Images, known: Mask) -> "Calibration":
        """With these images counted in; any one scale of the three will do. Refuses what
        `_residuals` refuses."""
        drawn, real = _residuals(sample, mean, truth, known)
        return Calibration(
            self.sample.add(drawn[~known].flatten()),
            self.truth.add(real[~known].flatten()),
            self.sample_neighbours.add(drawn, ~known),
            self.truth_neighbours.add(real, ~known),
        )

    def report(self) -> dict[str, float]:
        """`spread` = Var(s - mu) / Var(x - mu) (right: 1; below: collapse toward the mean) and
        `coherence`, the correlation between neighbours of s - mu (right: `coherence_truth`,
        that of x - mu; lower: speckle; higher: blur)."""
        return {
            "spread": _Spread(self.sample, self.truth).ratio,
            "coherence": self.sample_neighbours.correlation,
            "coherence_truth": self.truth_neighbours.correlation,
        }


@dataclass(frozen=True)
class SextileSpread(Sums):
    """The spread of samples in each sixth of the unknown pixels, by activity: an average of 1 can
    hide 2 in the sky and 0.8 in the leaves.

    The sixths are of pixels, told by what is known: a true sample has 1 in each.
    """

    spread_1: _Spread = field(default_factory=_Spread)
    spread_2: _Spread = field(default_factory=_Spread)
    spread_3: _Spread = field(default_factory=_Spread)
    spread_4: _Spread = field(default_factory=_Spread)
    spread_5: _Spread = field(default_factory=_Spread)
    spread_6: _Spread = field(default_factory=_Spread)

    def add(
        self, sample: Images, mean: Images, truth: Images, known: Mask, sextile: Sextile
    ) -> "SextileSpread":
        """With these images counted in, as by Calibration."""
        require_same_shape(truth=truth, sextile=sextile)
        drawn, real = _residuals(sample, mean, truth, known)
        found = []
        for number, key in enumerate(SEXTILE_SPREADS):
            where = ~known & (sextile == number)
            found.append(getattr(self, key).add(drawn[where].flatten(), real[where].flatten()))
        return SextileSpread(*found)

    def report(self) -> dict[str, float]:
        """`spread_1` of the calmest sixth to `spread_6` of the busiest (right: 1)."""
        return {key: getattr(self, key).ratio for key in SEXTILE_SPREADS}


@dataclass(frozen=True)
class _Covariance(Sums):
    """Sums over colours and over products of their channels, for their covariance."""

    count: int = 0
    r: float = 0.0
    g: float = 0.0
    b: float = 0.0
    rr: float = 0.0
    rg: float = 0.0
    rb: float = 0.0
    gg: float = 0.0
    gb: float = 0.0
    bb: float = 0.0

    def add(self, colours: Float[Tensor, "n 3"]) -> "_Covariance":
        rows, columns = torch.triu_indices(3, 3)  # rr rg rb gg gb bb
        products = colours[:, rows] * colours[:, columns]
        return self + _Covariance(len(colours), *colours.sum(0).tolist(), *products.sum(0).tolist())

    @property
    def matrix(self) -> Float[Tensor, "3 3"]:
        """Of the whole, with the mean taken off; of one colour at least."""
        count, *sums = self.flat()
        mean = torch.tensor(sums[:3], dtype=torch.float64) / count
        products = torch.tensor(sums[3:], dtype=torch.float64) / count
        upper = torch.zeros(3, 3, dtype=torch.float64)
        upper[tuple(torch.triu_indices(3, 3))] = products
        return upper + upper.triu(1).T - mean.outer(mean)


@dataclass(frozen=True)
class AxisSpread(Sums):
    """The spread of samples along each colour axis: the eigenvectors of the covariance that the
    truth's x - mu has over unknown pixels. Most of it is brightness; a spread of 1 there can hide
    colours that are too grey or too gaudy."""

    sample: _Covariance = field(default_factory=_Covariance)
    truth: _Covariance = field(default_factory=_Covariance)

    def add(self, sample: Images, mean: Images, truth: Images, known: Mask) -> "AxisSpread":
        """With these images counted in, as by Calibration."""
        drawn, real = _residuals(sample, mean, truth, known)
        return AxisSpread(self.sample.add(drawn[~known]), self.truth.add(real[~known]))

    def report(self) -> dict[str, float]:
        """`spread_axis_1` to `spread_axis_3`, Var(s - mu) / Var(x - mu) along the truth's axes,
        that of most variance first (right: 1); nan along one that the truth does not vary on."""
        if not self.truth.count:
            return dict.fromkeys(AXIS_SPREADS, math.nan)
        real, axes = torch.linalg.eigh(self.truth.matrix)  # rising; an axis is a column
        drawn = (axes * (self.sample.matrix @ axes)).sum(0)
        least = NO_AXIS * real[-1]
        ratios = torch.where(real > least, drawn / real, math.nan).flip(0).tolist()
        return dict(zip(AXIS_SPREADS, ratios, strict=True))
