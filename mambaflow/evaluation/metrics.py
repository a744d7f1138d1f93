"""What a prediction is worth, as sums that merge: one worker or eight give the same numbers.

Each class is a frozen value that starts at zero; `add` returns the sum with a batch counted in,
`+` merges two, `report` reads the numbers. Images are b h w 3 in [0, 1] with known pixels copied;
sums are float64. Definitions: the evaluation protocol in README.md.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

PERFECT_DB = 100.0
SSIM_WINDOW = 7  # pixels a side
FLAT, OUTLIER, CALM = 0.03, 0.08, 0.04  # of speckle


S = TypeVar("S", bound="_Sums")


class _Sums:
    """Fields that add up, one by one."""

    def __add__(self: S, other: S) -> S:
        mine: Any = self
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(mine)))


@dataclass(frozen=True)
class Moments(_Sums):
    """Mean, variance and standard error of numbers, such as one per image."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Float[Tensor, " b"]) -> "Moments":
        """With these numbers counted in."""
        wide = values.double()
        return self + Moments(len(values), wide.sum().item(), wide.square().sum().item())

    @property
    def mean(self) -> float:
        """nan of nothing."""
        return self.total / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """Of the sample; nan below two values."""
        if self.count < 2:
            return math.nan
        return max(self.squares - self.total**2 / self.count, 0.0) / (self.count - 1)

    @property
    def standard_error(self) -> float:
        """Of the mean; nan below two values."""
        return math.sqrt(self.variance / self.count) if self.count else math.nan


def psnr(
    prediction: Float[Tensor, "b h w 3"],
    truth: Float[Tensor, "b h w 3"],
    where: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Decibels of each image for a range of 1, over the pixels `where` (default: all).

    A perfect image counts 100 dB, where an infinity would hide all others; one wrong step in
    one byte of a 32 x 32 image is 83 dB, so that no other image comes near.
    """
    error = (prediction.double() - truth.double()).square().mean(-1)
    if where is None:
        where = torch.ones_like(error, dtype=torch.bool)
    count = where.sum((1, 2))
    if not count.all():
        raise ValueError("where (=no pixel in some image) must leave a pixel to score in each")
    mean_square = (error * where).sum((1, 2)) / count
    return -10 * mean_square.clamp(min=10 ** (-PERFECT_DB / 10)).log10()


def ssim(
    prediction: Float[Tensor, "b h w 3"], truth: Float[Tensor, "b h w 3"]
) -> Float[Tensor, " b"]:
    """Structural similarity of each image (Wang et al. 2004), range 1, mean over channels.

    As scikit-image's default: 7 x 7 uniform windows inside the image, sample covariance.
    """
    if min(truth.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"image size (={tuple(truth.shape[1:3])}) must be at least {SSIM_WINDOW} a side "
            "for SSIM"
        )
    x, y = (image.double().permute(0, 3, 1, 2) for image in (prediction, truth))
    products = torch.cat((x, y, x * x, y * y, x * y), 1)
    mx, my, xx, yy, xy = F.avg_pool2d(products, SSIM_WINDOW, stride=1).chunk(5, 1)
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    vx, vy, cxy = sample * (xx - mx * mx), sample * (yy - my * my), sample * (xy - mx * my)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mx * my + c1) * (2 * cxy + c2)
    return (similarity / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean((1, 2, 3))


@dataclass(frozen=True)
class Quality(_Sums):
    """PSNR over the full image and over its unknown pixels, and SSIM, averaged per image."""

    psnr: Moments = field(default_factory=Moments)
    psnr_unknown: Moments = field(default_factory=Moments)
    ssim: Moments = field(default_factory=Moments)

    def add(
        self,
        prediction: Float[Tensor, "b h w 3"],
        truth: Float[Tensor, "b h w 3"],
        known: Bool[Tensor, "b h w"],
    ) -> "Quality":
        """With these images counted in; `known` is True where the colour was given."""
        _in_range(prediction, truth)
        return Quality(
            self.psnr.add(psnr(prediction, truth)),
            self.psnr_unknown.add(psnr(prediction, truth, ~known)),
            self.ssim.add(ssim(prediction, truth)),
        )

    def report(self) -> dict[str, float]:
        """Means with standard errors (`_se`), and the number of images."""
        scores: dict[str, float] = {"images": float(self.psnr.count)}
        for f in fields(self):
            moments: Moments = getattr(self, f.name)
            scores |= {f.name: moments.mean, f"{f.name}_se": moments.standard_error}
        return scores


def _in_range(*images: Tensor) -> None:
    for image in images:
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"image values (={low:.3g} to {high:.3g}) must be in [0, 1]; "
                "use ((rgb + 1) / 2).clamp(0, 1)"
            )


def _neighbourhoods(images: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b i j 3 9"]:
    """The 3 x 3 values around each value that has them, its own fifth; channels apart."""
    return images.double().unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2)


@dataclass(frozen=True)
class Speckle(_Sums):
    """Lone values in regions where the truth is flat: |x - median of 3 x 3| there.

    A value (one channel of one pixel, off the border) is in a flat region where the truth's
    3 x 3 standard deviation is below 0.03. An outlier lies more than 0.08 from its median where
    the truth's lies less than 0.04 from its own. Pooled over all images.
    """

    flat: int = 0
    prediction: float = 0.0
    truth: float = 0.0
    outliers: int = 0

    def add(
        self, prediction: Float[Tensor, "b h w 3"], truth: Float[Tensor, "b h w 3"]
    ) -> "Speckle":
        """With these images counted in."""
        _in_range(prediction, truth)
        around, around_truth = _neighbourhoods(prediction), _neighbourhoods(truth)
        flat = around_truth.std(-1, correction=0) < FLAT
        lone, lone_truth = (
            (near[..., 4] - near.median(-1).values).abs()[flat] for near in (around, around_truth)
        )
        outliers = (lone > OUTLIER) & (lone_truth < CALM)
        return self + Speckle(
            len(lone), lone.sum().item(), lone_truth.sum().item(), int(outliers.sum())
        )

    def report(self) -> dict[str, float]:
        """`speckle` (0 is right, negative is smoother than the truth) and `outlier_rate`."""
        if not self.flat:
            return {"speckle": math.nan, "outlier_rate": math.nan}
        return {
            "speckle": (self.prediction - self.truth) / self.flat,
            "outlier_rate": self.outliers / self.flat,
        }


@dataclass(frozen=True)
class _Neighbours(_Sums):
    """Sums over pairs (a, b), each counted both ways round, for their correlation."""

    pairs: int = 0
    total: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, values: Float[Tensor, "b h w 3"], where: Bool[Tensor, "b h w"]) -> "_Neighbours":
        sums = self
        for axis in (1, 2):
            last = values.shape[axis] - 1
            both = where.narrow(axis, 0, last) & where.narrow(axis, 1, last)
            a, b = values.narrow(axis, 0, last)[both], values.narrow(axis, 1, last)[both]
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
        return (self.products - centre) / variance if variance > 0 else math.nan


@dataclass(frozen=True)
class Calibration(_Sums):
    """Whether samples have the law of the truth around the posterior mean, over unknown pixels.

    A true draw s and the truth x have the same law around mu. Give values that are not clipped
    where possible: clipping narrows the spread.
    """

    sample: Moments = field(default_factory=Moments)
    truth: Moments = field(default_factory=Moments)
    sample_neighbours: _Neighbours = field(default_factory=_Neighbours)
    truth_neighbours: _Neighbours = field(default_factory=_Neighbours)

    def add(
        self,
        sample: Float[Tensor, "b h w 3"],
        mean: Float[Tensor, "b h w 3"],
        truth: Float[Tensor, "b h w 3"],
        known: Bool[Tensor, "b h w"],
    ) -> "Calibration":
        """With these images counted in; any one scale of the three will do."""
        centre = mean.double()
        drawn, real = sample.double() - centre, truth.double() - centre
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
        drawn, real = self.sample.variance, self.truth.variance
        return {
            "spread": drawn / real if real > 0 else math.nan,
            "coherence": self.sample_neighbours.correlation,
            "coherence_truth": self.truth_neighbours.correlation,
        }
