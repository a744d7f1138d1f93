"""How near a prediction comes to the truth: PSNR and SSIM, each of an image by itself."""

from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mambaflow.evaluation.scored_images import Images, Mask, require_in_range, require_same_shape
from mambaflow.evaluation.sums import Moments, Sums

PERFECT_DB = 100.0
SSIM_WINDOW = 7  # pixels a side


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
