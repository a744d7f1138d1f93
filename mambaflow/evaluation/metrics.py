"""What a prediction is worth, as sums that merge: one worker or eight give the same numbers.

Each class is a frozen value that starts at zero; `add` returns the sum with a batch counted in,
`+` merges two, `report` reads the numbers, `flat` and `unflat` take the sums through a collective.
METRICS is the registry: what reports, validation and benchmarks score, and how tables show it.

Images are b h w 3 in [0, 1], known pixels copied into the prediction; sums are float64.

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
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

PERFECT_DB = 100.0
SSIM_WINDOW = 7  # pixels a side
FLAT, OUTLIER, CALM = 0.03, 0.08, 0.04  # of speckle
# A colour axis with less than this share of the widest one's variance is what rounding left.
NO_AXIS = 1e-9
SEXTILE_SPREADS = tuple(f"spread_{number}" for number in range(1, 7))  # from the calmest on
AXIS_SPREADS = tuple(f"spread_axis_{number}" for number in range(1, 4))  # from the widest on

Images = Float[Tensor, "b h w 3"]
Mask = Bool[Tensor, "b h w"]
Sextile = UInt8[Tensor, "b h w"]  # 0 the calmest sixth of the pixels, 5 the busiest
S = TypeVar("S", bound="Sums")  # not Self: what checks shapes in tests decorates methods alone


class Sums:
    """Fields that add up, one by one: numbers, or sums themselves."""

    def __add__(self: S, other: S) -> S:
        mine: Any = self  # `fields` wants a dataclass, which subclasses are
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(mine)))

    def flat(self) -> list[float]:
        """Every number, in a fixed order: what a collective adds up over the workers."""
        mine: Any = self
        values = (getattr(self, f.name) for f in fields(mine))
        # By depth, in the order of the fields; `unflat` walks the same way.
        return [x for v in values for x in (v.flat() if isinstance(v, Sums) else [float(v)])]

    def unflat(self: S, numbers: Iterator[float]) -> S:
        """Sums of this kind, of the next numbers that `flat` gave."""
        mine: Any = self
        values = (getattr(self, f.name) for f in fields(mine))
        # Counts travel as floats, exact up to 2^53, and become int again.
        return type(self)(
            *(v.unflat(numbers) if isinstance(v, Sums) else type(v)(next(numbers)) for v in values)
        )


@dataclass(frozen=True)
class Moments(Sums):
    """Mean, variance and standard error of numbers, such as one per image."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Float[Tensor, " b"]) -> "Moments":
        """With these numbers counted in."""
        # A variance is the difference of two large sums: float32 would leave little of it.
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
        # Rounding may leave a variance of equal values just below zero.
        return max(self.squares - self.total**2 / self.count, 0.0) / (self.count - 1)

    @property
    def standard_error(self) -> float:
        """Of the mean; nan below two values."""
        return math.sqrt(self.variance / self.count) if self.count else math.nan


def require_same_shape(**images: Tensor) -> None:
    """Refuse images that would be broadcast against one another."""
    # Without channels, which a mask does not have.
    shapes = {name: tuple(image.shape[:3]) for name, image in images.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} (={shape})" for name, shape in shapes.items())
        raise ValueError(f"{told} must agree in images, height and width; score like with like")


def require_in_range(**images: Tensor) -> None:
    for name, image in images.items():
        # No images are in range: min() would raise.
        low, high = (image.min().item(), image.max().item()) if image.numel() else (0.0, 1.0)
        if not (low >= 0 and high <= 1):  # nor is nan
            raise ValueError(
                f"{name} (={low:.3g} to {high:.3g}): image values must be in [0, 1]; "
                "use ((rgb + 1) / 2).clamp(0, 1)"
            )


def psnr(prediction: Images, truth: Images, where: Mask | None = None) -> Float[Tensor, " b"]:
    """Decibels of each image for a range of 1, over the pixels `where` (default: all).

    A perfect image counts 100 dB, where an infinity would hide all others; one wrong step in
    one byte of a 32 x 32 image is 83 dB, so that no other image comes near. What lies outside
    `where` is not looked at, not even where it is no number.

    Raises:
        ValueError: shapes that differ; an image without a pixel to score.
    """
    if where is None:
        where = torch.ones(truth.shape[:3], dtype=torch.bool, device=truth.device)
    require_same_shape(prediction=prediction, truth=truth, where=where)
    count = where.sum((1, 2))
    if not count.all():
        raise ValueError("where (=no pixel in some image) must leave a pixel to score in each")
    error = (prediction.double() - truth.double()).square().mean(-1)  # (b, h, w)
    # Chosen, not multiplied by 0: 0 x nan is nan.
    mean_square = torch.where(where, error, 0.0).sum((1, 2)) / count
    return -10 * mean_square.clamp(min=10 ** (-PERFECT_DB / 10)).log10()  # not log 0


def ssim(prediction: Images, truth: Images) -> Float[Tensor, " b"]:
    """Structural similarity of each image (Wang et al. 2004), range 1, mean over channels.

    As scikit-image's default: 7 x 7 uniform windows inside the image, sample covariance.

    Raises:
        ValueError: shapes that differ; images smaller than a window.
    """
    require_same_shape(prediction=prediction, truth=truth)
    if min(truth.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"image size (={tuple(truth.shape[1:3])}) must be at least {SSIM_WINDOW} a side "
            "for SSIM; score larger images"
        )
    # Channels first, for the pooling below. Variances are differences of means: float32 would lose
    # what is left of them in flat parts.
    x, y = (image.double().permute(0, 3, 1, 2) for image in (prediction, truth))
    # (b, 15, h, w): the five means of all windows in one pass, each (b, 3, h - 6, w - 6).
    products = torch.cat((x, y, x * x, y * y, x * y), 1)
    mx, my, xx, yy, xy = F.avg_pool2d(products, SSIM_WINDOW, stride=1).chunk(5, 1)
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)  # from the mean over 49 to a division by 48
    vx, vy, cxy = sample * (xx - mx * mx), sample * (yy - my * my), sample * (xy - mx * my)
    c1, c2 = 0.01**2, 0.03**2  # the paper's, for a range of 1; in flat windows not 0 / 0
    similarity = (2 * mx * my + c1) * (2 * cxy + c2)
    return (similarity / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean((1, 2, 3))


@dataclass(frozen=True)
class Quality(Sums):
    """PSNR over the full image and over its unknown pixels, and SSIM, averaged per image."""

    psnr: Moments = field(default_factory=Moments)
    psnr_unknown: Moments = field(default_factory=Moments)
    ssim: Moments = field(default_factory=Moments)

    def add(self, prediction: Images, truth: Images, known: Mask) -> "Quality":
        """With these images counted in; `known` is True where the colour was given."""
        # The model's own colours are in [-1, 1], and would be scored without a word.
        require_in_range(prediction=prediction, truth=truth)
        if not len(truth):
            return self
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


@dataclass(frozen=True)
class Cost(Sums):
    """What an answer took: calls of the velocity, and seconds of the worker that made it."""

    images: int = 0
    calls: int = 0
    seconds: float = 0.0

    def add(self, images: int, calls: int, seconds: float) -> "Cost":
        """With a batch of images counted in, made together in so many calls and seconds."""
        return self + Cost(images, calls * images, seconds)  # every image was in every call

    def report(self) -> dict[str, float]:
        """`nfe`, calls an image, and `seconds` an image."""
        if not self.images:
            return {"nfe": math.nan, "seconds": math.nan}
        return {"nfe": self.calls / self.images, "seconds": self.seconds / self.images}


@dataclass(frozen=True)
class Completion:
    """Completed images, and what they are scored against."""

    prediction: Images
    """In [0, 1]."""
    truth: Images
    known: Mask
    mean: Images | None = None
    """The posterior mean, not clipped, where the prediction is one sample around it."""
    calls: int | None = None
    """Calls of the velocity; None where there is no velocity, as in a classical fill."""
    seconds: float = 0.0
    sextile: Sextile | None = None
    """The sixth of all pixels, by activity, that each pixel is in; None: nothing by sextile."""
    unclipped: Images | None = None
    """The prediction before it was clipped to [0, 1], where it was."""

    def image(self, i: int) -> "Completion":
        """One of the images, by itself, with its share of the seconds."""
        one = slice(i, i + 1)
        parts: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[one]
            for name in ("prediction", "truth", "known", "mean", "sextile", "unclipped")
        }
        return replace(self, **parts, seconds=self.seconds / len(self.truth))

    @property
    def answer(self) -> Images:
        """What was answered, not clipped: what spreads are measured on."""
        return self.prediction if self.unclipped is None else self.unclipped


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
