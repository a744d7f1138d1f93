"""Lone values, which lie far from the median of their 3 x 3.

There are two speckles: one looks where the truth is flat, the fair one where the known pixels are
calm.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mambaflow.evaluation.scored_images import (
    Images,
    Mask,
    Sextile,
    require_in_range,
    require_same_shape,
)
from mambaflow.evaluation.sums import Sums

FLAT, OUTLIER, CALM = 0.03, 0.08, 0.04


def _neighbourhoods(images: Images) -> Float[Tensor, "b i j 3 9"]:
    """The 3 x 3 values around each value that has them, its own fifth; channels apart."""
    # Each unfold takes 2 from a side and adds a last dimension of 3.
    return images.double().unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2)


def _lone(near: Float[Tensor, "*values 9"]) -> Float[Tensor, "*values"]:
    """How far each value lies from the median of its 3 x 3."""
    return (near[..., 4] - near.median(-1).values).abs()


@dataclass(frozen=True)
class Speckle(Sums):
    """Lone values in regions where the truth is flat: |x - median of 3 x 3| there.

    A value (one channel of one pixel, off the border) is in a flat region where the truth's
    3 x 3 standard deviation is below 0.03. An outlier lies more than 0.08 from its median where
    the truth's lies less than 0.04 from its own. Pooled over all images.

    To compare models by. Its 0 is nobody's: a sampler cannot know where the truth happens to be
    flat, and a perfect one scores above it.
    """

    flat_values: int = 0
    prediction: float = 0.0
    truth: float = 0.0
    outliers: int = 0

    def add(self, prediction: Images, truth: Images) -> "Speckle":
        """With these images counted in; an image below 3 x 3 has no value off its border."""
        require_same_shape(prediction=prediction, truth=truth)
        require_in_range(prediction=prediction, truth=truth)
        if not len(truth) or min(truth.shape[1:3]) < 3:
            return self
        around, around_truth = _neighbourhoods(prediction), _neighbourhoods(truth)
        # correction=0: a window is a whole, not a sample of one.
        flat = around_truth.std(-1, correction=0) < FLAT  # (b, h - 2, w - 2, 3)
        # Distances from the median, of the values in flat regions alone: two rows of numbers.
        lone, lone_truth = (_lone(near)[flat] for near in (around, around_truth))
        outliers = (lone > OUTLIER) & (lone_truth < CALM)  # not where the truth stands out itself
        return self + Speckle(
            len(lone), lone.sum().item(), lone_truth.sum().item(), int(outliers.sum())
        )

    def report(self) -> dict[str, float]:
        """`speckle` (0 is right, negative is smoother than the truth) and `outlier_rate`."""
        if not self.flat_values:
            return {"speckle": math.nan, "outlier_rate": math.nan}
        return {
            "speckle": (self.prediction - self.truth) / self.flat_values,
            "outlier_rate": self.outliers / self.flat_values,
        }


@dataclass(frozen=True)
class FairSpeckle(Sums):
    """Lone values where the known pixels are calm: |s - median of 3 x 3|, less the truth's.

    A value counts if it is off the border, unknown, and in the calmest sextile of activity. That
    is picked by known pixels alone, given which a true sample and the truth have one law: the
    difference of any two numbers of theirs is 0 in expectation, and changes its sign where they
    change places. Pooled over all images.
    """

    values: int = 0
    prediction: float = 0.0
    truth: float = 0.0
    outliers: int = 0
    truth_outliers: int = 0

    def add(
        self, prediction: Images, truth: Images, known: Mask, sextile: Sextile
    ) -> "FairSpeckle":
        """With these images counted in; an image below 3 x 3 has no value off its border."""
        require_same_shape(prediction=prediction, truth=truth, known=known, sextile=sextile)
        require_in_range(prediction=prediction, truth=truth)
        if not len(truth) or min(truth.shape[1:3]) < 3:
            return self
        calm = (~known & (sextile == 0))[:, 1:-1, 1:-1]  # (b, h - 2, w - 2)
        lone, real = (_lone(_neighbourhoods(image)[calm]) for image in (prediction, truth))
        outliers, truth_outliers = (int((x > OUTLIER).sum()) for x in (lone, real))
        return self + FairSpeckle(
            lone.numel(), lone.sum().item(), real.sum().item(), outliers, truth_outliers
        )

    def report(self) -> dict[str, float]:
        """`fair_speckle` (right for a sample: 0; a mean is below) and `fair_outlier_rate`, the
        share of values more than 0.08 from their median, less the truth's (right: 0)."""
        if not self.values:
            return {"fair_speckle": math.nan, "fair_outlier_rate": math.nan}
        return {
            "fair_speckle": (self.prediction - self.truth) / self.values,
            "fair_outlier_rate": (self.outliers - self.truth_outliers) / self.values,
        }
