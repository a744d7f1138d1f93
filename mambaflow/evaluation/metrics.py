"""What a prediction is worth, number by number.

METRICS is the registry: what reports, validation and benchmarks score, and how tables show it.
Scores are the sums of all of them.

    psnr, psnr_unknown  decibels of each image, of all its pixels and of the unknown ones; the mean
                        over images. Copying a fifth of the pixels is worth 0.97 dB of the first.
    ssim                structural similarity of each image (Wang et al. 2004), the mean over images
    speckle, outliers   lone values where the truth is flat, pooled over images: to compare models
                        by, since a perfect sampler scores above 0 too: see Speckle
    fair_speckle        lone values where the known pixels are calm: a perfect sampler scores 0
                        in expectation: see FairSpeckle
    spread, coherence   whether a sample has the law of the truth around the posterior mean,
                        pooled over unknown pixels: see Calibration
    spread_1 .. 6       the same spread in each sixth of the pixels, from the calmest to the
                        busiest: see SextileSpread
    spread_axis_1 .. 3  the same spread along each colour axis of the truth: see AxisSpread

What is clipped to [0, 1] is an image, and all but the spreads and coherence are of images; these
are of the answer as the solver gave it, since clipping narrows a spread.

A posterior mean and one sample are different answers: a true sample of the posterior has 3.01 dB
less than its mean on unknown pixels.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mambaflow.evaluation.calibration import (
    AXIS_SPREADS,
    SEXTILE_SPREADS,
    AxisSpread,
    Calibration,
    SextileSpread,
)
from mambaflow.evaluation.cost import Cost
from mambaflow.evaluation.quality import Quality
from mambaflow.evaluation.scored_images import Completion
from mambaflow.evaluation.speckle import FairSpeckle, Speckle
from mambaflow.evaluation.sums import Sums


class Column(NamedTuple):
    """How a table shows a number: its title, decimals, and where its standard error is."""

    title: str
    decimals: int
    error: str = ""
    brief: bool = True
    """Whether the short table at a run's end has it."""
    detailed: bool = False
    """Whether the table under it has it, which is of samples alone."""


class Metric(NamedTuple):
    """An entry of the registry: sums, how a completion is counted in, and columns by key."""

    zero: Any
    """Sums of nothing."""
    add: Any
    """(sums, completion) -> sums with the completion counted in."""
    columns: Mapping[str, Column]
    validated: tuple[str, ...] = ()
    """Keys whose curves are drawn during training, of the posterior mean."""
    sampled: tuple[str, ...] = ()
    """The same of one sample."""


# A metric is added here and tested in tests/evaluation/test_metrics.py; nothing else names it.
METRICS: dict[str, Metric] = {
    "quality": Metric(
        Quality(),
        lambda sums, c: sums.add(c.prediction, c.truth, c.known),
        {
            "psnr": Column("PSNR full", 2, "psnr_se"),
            "psnr_unknown": Column("PSNR unknown", 2, "psnr_unknown_se"),
            "ssim": Column("SSIM", 3),
        },
        validated=("psnr", "psnr_se", "psnr_unknown", "ssim"),
        sampled=("psnr", "psnr_unknown", "ssim"),
    ),
    "speckle": Metric(
        Speckle(),
        lambda sums, c: sums.add(c.prediction, c.truth),
        {"speckle": Column("speckle", 4), "outlier_rate": Column("outliers", 4, brief=False)},
        validated=("speckle",),
        sampled=("speckle",),
    ),
    "fair_speckle": Metric(
        FairSpeckle(),
        lambda sums, c: (
            sums if c.sextile is None else sums.add(c.prediction, c.truth, c.known, c.sextile)
        ),
        {
            "fair_speckle": Column("fair speckle", 4),
            "fair_outlier_rate": Column("fair outliers", 4, brief=False),
        },
        sampled=("fair_speckle",),
    ),
    "calibration": Metric(
        Calibration(),
        # A mean has no spread around itself: it is not counted in.
        lambda sums, c: sums if c.mean is None else sums.add(c.answer, c.mean, c.truth, c.known),
        {
            "spread": Column("spread", 2),
            "coherence": Column("coherence", 2),
            "coherence_truth": Column("truth's coherence", 2, brief=False, detailed=True),
        },
        sampled=("spread", "coherence", "coherence_truth"),
    ),
    "sextile_spread": Metric(
        SextileSpread(),
        lambda sums, c: (
            sums
            if c.mean is None or c.sextile is None
            else sums.add(c.answer, c.mean, c.truth, c.known, c.sextile)
        ),
        {
            key: Column(f"sixth {number}", 2, brief=False, detailed=True)
            for number, key in enumerate(SEXTILE_SPREADS, 1)
        },
        sampled=SEXTILE_SPREADS,
    ),
    "axis_spread": Metric(
        AxisSpread(),
        lambda sums, c: sums if c.mean is None else sums.add(c.answer, c.mean, c.truth, c.known),
        {
            key: Column(f"axis {number}", 2, brief=False, detailed=True)
            for number, key in enumerate(AXIS_SPREADS, 1)
        },
        sampled=AXIS_SPREADS,
    ),
    "cost": Metric(
        Cost(),
        # A classical fill calls no velocity.
        lambda sums, c: (
            sums if c.calls is None else sums.add(len(c.prediction), c.calls, c.seconds)
        ),
        {"nfe": Column("NFE", 0), "seconds": Column("s / image", 4, brief=False)},
    ),
}
# In the order of the registry, which is that of the tables.
COLUMNS: dict[str, Column] = {k: v for m in METRICS.values() for k, v in m.columns.items()}
VALIDATED: list[str] = [key for metric in METRICS.values() for key in metric.validated]
# By the name of the curve: a name is of one answer, the mean's where both have the number.
SAMPLED: dict[str, str] = {
    f"sample_{key}" if key in VALIDATED else key: key
    for metric in METRICS.values()
    for key in metric.sampled
}


@dataclass(frozen=True)
class Scores:
    """Every metric's sums for one way of completing images."""

    sums: Mapping[str, Sums] = field(
        default_factory=lambda: {k: m.zero for k, m in METRICS.items()}
    )

    def add(self, completion: Completion) -> "Scores":
        """With these images counted in, by every metric that has something to say of them."""
        return Scores({k: m.add(self.sums[k], completion) for k, m in METRICS.items()})

    def __add__(self, other: "Scores") -> "Scores":
        return Scores({k: v + other.sums[k] for k, v in self.sums.items()})

    def flat(self) -> list[float]:
        """Every number, in a fixed order."""
        return [x for sums in self.sums.values() for x in sums.flat()]

    def unflat(self, numbers: Iterator[float]) -> "Scores":
        """Scores of the next numbers that `flat` gave."""
        return Scores({k: v.unflat(numbers) for k, v in self.sums.items()})

    def report(self) -> dict[str, float]:
        """Every number that is one: a fill has no NFE, a mean no spread."""
        sums: Mapping[str, Any] = self.sums
        found = {k: x for s in sums.values() for k, x in s.report().items()}
        return {k: x for k, x in found.items() if not math.isnan(x)}
