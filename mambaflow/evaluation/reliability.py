"""Whether the deviation of several samples tells how far off their mean is."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambaflow.checks import require
from mambaflow.evaluation.sums import Sums

# Between the bins of predicted deviation, for a range of 1: narrow where most pixels are.
EDGES = (0.01, 0.02, 0.04, 0.06, 0.08, 0.11, 0.14, 0.18, 0.24)


@dataclass(frozen=True)
class _Bin(Sums):
    """Values of one bin: how far off they were thought to be, and were."""

    values: int = 0
    predicted: float = 0.0
    observed: float = 0.0


@dataclass(frozen=True)
class Reliability(Sums):
    """Predicted against observed error of unknown values, in bins of the predicted deviation.

    Of K samples and the truth, all of one law with variance V, the sample variance has mean V,
    and the truth lies V (1 + 1 / K) from the mean of the samples in the mean of squares: squares
    are divided by that factor, so that predicted and observed are equal for a perfect sampler in
    every bin with many values (up to what V varies within a bin's sampling error).
    """

    bin_1: _Bin = field(default_factory=_Bin)
    bin_2: _Bin = field(default_factory=_Bin)
    bin_3: _Bin = field(default_factory=_Bin)
    bin_4: _Bin = field(default_factory=_Bin)
    bin_5: _Bin = field(default_factory=_Bin)
    bin_6: _Bin = field(default_factory=_Bin)
    bin_7: _Bin = field(default_factory=_Bin)
    bin_8: _Bin = field(default_factory=_Bin)
    bin_9: _Bin = field(default_factory=_Bin)
    bin_10: _Bin = field(default_factory=_Bin)

    def add(
        self,
        samples: Float[Tensor, "draws h w 3"],
        truth: Float[Tensor, "h w 3"],
        known: Bool[Tensor, "h w"],
    ) -> "Reliability":
        """With one image counted in; samples are not clipped.

        Raises:
            ValueError: fewer than two samples.
        """
        count = len(samples)
        require(count > 1, f"samples (={count}) must be at least 2 to deviate; use 8")
        drawn, real = samples.double()[:, ~known], truth.double()[~known]  # (draws, unknown, 3)
        variance = drawn.var(0)
        squared = (real - drawn.mean(0)).square() / (1 + 1 / count)
        number = torch.bucketize(variance.sqrt(), torch.tensor(EDGES, dtype=torch.float64))
        found = []
        for i in range(len(EDGES) + 1):
            of_bin = number == i
            found.append(
                _Bin(int(of_bin.sum()), variance[of_bin].sum().item(), squared[of_bin].sum().item())
            )
        return self + Reliability(*found)

    def report(self) -> list[tuple[float, float, int]]:
        """Predicted deviation, root mean square error and values, of each bin that has any."""
        bins = [getattr(self, f"bin_{i}") for i in range(1, len(EDGES) + 2)]
        return [
            (math.sqrt(b.predicted / b.values), math.sqrt(b.observed / b.values), b.values)
            for b in bins
            if b.values
        ]
