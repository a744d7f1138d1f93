"""The parts of the network that are not the scan: features, time, planes, modulation."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.kernels.linear import Linear
from mambaflow.models.attention import attend

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


class FourierFeatures(nn.Module):
    """Sines and cosines of coordinates, none faster than `max_frequency` cycles per image.

    Tancik et al. 2020, with fixed frequencies instead of random ones: magnitudes in geometric
    progression from 1/2, directions a golden angle apart. Band-limited, since a wave beyond
    the training grid's Nyquist frequency is free to do anything between its points.
    """

    def __init__(self, frequencies: int, max_frequency: float) -> None:
        super().__init__()
        i = torch.arange(frequencies, dtype=torch.float64)
        share = i / max(frequencies - 1, 1)
        magnitude = 0.5 * (2 * max_frequency) ** share
        direction = torch.stack((torch.cos(i * GOLDEN_ANGLE), torch.sin(i * GOLDEN_ANGLE)))
        waves = (2 * math.pi * magnitude * direction).float()
        self.waves: Tensor
        # In no checkpoint: the configuration gives them.
        self.register_buffer("waves", waves, persistent=False)
        self.width = 2 * frequencies + 2

    def forward(self, xy: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n width"]:
        centred = xy - 0.5
        with torch.autocast(xy.device.type, enabled=False):  # 16 cycles would drown in bf16
            phase = centred @ self.waves
        return torch.cat((centred, phase.sin(), phase.cos()), -1)


class TimeEmbedding(nn.Module):
    """t in [0, 1] to a vector: sinusoids of t x scale (Vaswani et al. 2017), then an MLP."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        half = width // 2
        rates = scale * torch.exp(-math.log(10_000) * torch.arange(half) / max(half - 1, 1))
        self.rates: Tensor
        self.register_buffer("rates", rates, persistent=False)
        self.mlp = nn.Sequential(Linear(2 * half, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        phase = t[:, None] * self.rates
        return self.mlp(torch.cat((phase.sin(), phase.cos()), -1))


class Planes(NamedTuple):
    """What the known colours around a place look like, under each of several windows."""

    colours: Float[Tensor, "b n h 3"]
    """Of the planes, at the place."""
    unexplained: Float[Tensor, "b n h"]
    """Variance that the planes leave, of the three colours together; rounding may leave it below
    0."""
    token: Float[Tensor, "b n d"]
    """All that was seen, as a token."""


class LocalLinearFeatures(nn.Module):
    """The known colours around a place, as a plane fitted under each of several windows.

    Local linear regression (Cleveland 1979; Fan & Gijbels 1996, section 3.2): with p the softmax
    of -|x - y|^2 / 2 s^2 over known places y, the plane at x is E[c] + (x - E[y]) slope, where
    slope = (Cov[y] + r s^2)^-1 Cov[y, c]. A mean alone would lean toward the side where more is
    known. The widths s are learned, and so is r, which keeps a plane level whose window holds
    one pixel. One attention over the moments of y and c: no n x k matrix is kept.
    """

    def __init__(self, width: int, windows: int) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.linspace(math.log(0.02), math.log(0.3), windows))
        self.log_ridge = nn.Parameter(torch.full((windows,), math.log(0.3)))
        # From each window a plane's colour (3), its slopes (2 x 3) and the offset (2).
        self.features = Linear(11 * windows, width)

    def forward(
        self,
        xy: Float[Tensor, "b n 2"],
        known_xy: Float[Tensor, "b k 2"],
        known_rgb: Float[Tensor, "b k 3"],
    ) -> Planes:
        """The planes at `xy`."""
        with torch.autocast(xy.device.type, enabled=False):  # moments cancel: bf16 would drown them
            # Around the image's centre, where products of coordinates are smallest.
            planes, slopes, offset, left = self._fit(xy - 0.5, known_xy - 0.5, known_rgb)
        seen = torch.cat((planes, slopes.flatten(-2), offset), -1)  # (b, n, h, 11)
        return Planes(planes, left, self.features(seen.flatten(2)))

    def _fit(
        self, x: Float[Tensor, "b n 2"], y: Float[Tensor, "b k 2"], c: Float[Tensor, "b k 3"]
    ) -> tuple[Tensor, Float[Tensor, "b n h 2 3"], Float[Tensor, "b n h 2"], Tensor]:
        """Planes, slopes per window width, the offset E[y] - x in window widths, and the variance
        that is left."""
        variance = torch.exp(2 * self.log_width)  # (h,), positive whatever is learned
        mean_y, mean_c, yy, yc, cc = self._moments(x, y, c, variance)
        cov_yc = yc - mean_y[..., :, None] * mean_c[..., None, :]  # (b, n, h, 2, 3)
        cov_yy = yy - mean_y[..., :, None] * mean_y[..., None, :]  # (b, n, h, 2, 2)
        # One known pixel, or pixels on a line, leave a covariance that cannot be divided by.
        ridge = (self.log_ridge.exp() * variance)[:, None]
        a, d = (cov_yy.diagonal(dim1=-2, dim2=-1) + ridge).unbind(-1)
        b = cov_yy[..., 0, 1]
        # [[a, b], [b, d]] inverted by hand; its determinant is above 0 by the ridge.
        adjugate = torch.stack((d, -b, -b, a), -1).unflatten(-1, (2, 2))
        slopes = adjugate @ cov_yc / (a * d - b * b)[..., None, None]
        offset = mean_y - x[:, :, None]  # (b, n, h, 2)
        planes = mean_c - (offset[..., None, :] @ slopes)[..., 0, :]  # (b, n, h, 3)
        left = cc - mean_c.square().sum(-1) - (slopes * cov_yc).sum((-1, -2))  # (b, n, h)
        width = variance.sqrt()[:, None]
        # As features, slopes and offsets are of one size in all windows.
        return planes, slopes * width[..., None], offset / width, left

    def _moments(
        self, x: Tensor, y: Tensor, c: Tensor, variance: Float[Tensor, " h"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """E of y, c, y y', y c' and c'c under each window, (b, n, h, ...)."""
        yy, yc = y[..., :, None] * y[..., None, :], y[..., :, None] * c[..., None, :]
        cc = c.square().sum(-1, keepdim=True)
        value = torch.cat((y, c, yy.flatten(-2), yc.flatten(-2), cc), -1)  # (b, k, 16)
        # softmax of (x.y - |y|^2 / 2) / s^2 is that of -|x - y|^2 / 2 s^2: |x|^2 cancels.
        key = torch.cat((y, -0.5 * y.square().sum(-1, keepdim=True)), -1)
        query = F.pad(x, (0, 1), value=1.0)[:, None] / variance[:, None, None]  # (b, h, n, 3)
        # The windows differ in the query alone: keys and values are views, not copies.
        key, value = (m[:, None].expand(-1, len(variance), -1, -1) for m in (key, value))
        found = attend(query, key, value).transpose(1, 2)  # (b, n, h, 16)
        mean_y, mean_c, yy, yc, cc = found.split((2, 3, 4, 6, 1), -1)
        return mean_y, mean_c, yy.unflatten(-1, (2, 2)), yc.unflatten(-1, (2, 3)), cc[..., 0]


class Smooth(NamedTuple):
    """A smooth fill, and what it was made from."""

    fill: Float[Tensor, "b n 3"]
    features: Float[Tensor, "b n d"]
    unexplained: Float[Tensor, "b n h"]
    """Variance of the known colours that no plane explains."""


class Smoother(nn.Module):
    """A fill of the known pixels that knows neither noise nor time: planes under several windows,
    mixed by a gate per query; and the features that it saw on the way."""

    def __init__(self, width: int, windows: int) -> None:
        super().__init__()
        self.local_linear = LocalLinearFeatures(width, windows)
        self.gate = Linear(width, windows)
        self.correction = Linear(width, 3)
        # The fill starts as the planes alone, which beat a linear fill before any step.
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        xy: Float[Tensor, "b n 2"],
        known_xy: Float[Tensor, "b k 2"],
        known_rgb: Float[Tensor, "b k 3"],
    ) -> Smooth:
        """The fill and the features."""
        planes = self.local_linear(xy, known_xy, known_rgb)
        features = tokens + planes.token
        share = self.gate(features).float().softmax(-1)  # (b, n, h), float32 under autocast too
        fill = torch.einsum("bnh,bnhc->bnc", share, planes.colours)
        fill = fill + self.correction(F.silu(features)).float()
        return Smooth(fill, features, planes.unexplained)


class Modulation(nn.Module):
    """Scale, shift and gate of `sublayers` sublayers from the time (adaLN: Peebles & Xie 2023;
    one map shared by the blocks and a table for each: Chen et al. 2023)."""

    def __init__(self, width: int, sublayers: int, blocks: int) -> None:
        super().__init__()
        self.map = Linear(width, 3 * sublayers * width)
        # With the map at zero all times start alike; scale and shift of 0 change nothing.
        self.table = nn.Parameter(torch.zeros(blocks, sublayers, 3, width))
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        with torch.no_grad():
            self.table[:, :, 2] = 1.0  # gates open: a short run has no time to open them

    def forward(self, time: Float[Tensor, "b d"]) -> Float[Tensor, "blocks sublayers 3 b 1 d"]:
        shared = self.map(F.silu(time)).unflatten(-1, self.table.shape[1:])
        # From (blocks, b, sublayers, 3, 1, d): a block and a sublayer are picked by their numbers,
        # and the 1 is for the tokens.
        return (shared.float() + self.table[:, None])[..., None, :].permute(0, 2, 3, 1, 4, 5)


def mlp(width: int, ratio: int) -> nn.Sequential:
    """Two layers, `ratio` times as wide between them."""
    return nn.Sequential(
        Linear(width, ratio * width), nn.GELU("tanh"), Linear(ratio * width, width)
    )
