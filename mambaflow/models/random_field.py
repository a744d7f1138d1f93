"""A stationary Gaussian field over the plane: its correlation, and draws of it as Fourier series.

One draw is one function of the place. It may be read at a few scattered places, on a 32 x 32 grid
or on a 256 x 256 one, and where places coincide it says the same.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

# Side of the torus that a field lives on, in images. Two places of one image are then nearer to
# each other than to any copy of the other, and a correlation that has died down after half an image
# feels nothing of the torus.
TORUS = 2.0
PIXEL = 1 / 32  # lengths are told in pixels of a CIFAR-10 image, and computed in images


def distances(xy: Float[Tensor, "b n 2"], other: Float[Tensor, "b m 2"]) -> Float[Tensor, "b n m"]:
    """Between two sets of places, in images."""
    # Not by |x|^2 + |y|^2 - 2 x.y, which leaves 1e-4 of a distance that is 0.
    return torch.cdist(xy, other, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class Correlation:
    """exp(-(d / length)^exponent) of places d apart, the powered exponential.

    Rasmussen & Williams 2006, section 4.2.1 ("gamma-exponential"): positive definite in the plane
    for exponents in (0, 2]; fields are the rougher, the smaller the exponent.
    """

    length: Float[Tensor, ""]
    """In images."""
    exponent: Float[Tensor, ""]

    def of(self, distance: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """At these distances, in images; 1 at 0."""
        return torch.exp(-(distance / self.length).pow(self.exponent))

    def __call__(
        self, xy: Float[Tensor, "b n 2"], other: Float[Tensor, "b m 2"]
    ) -> Float[Tensor, "b n m"]:
        """Between two sets of places."""
        return self.of(distances(xy, other))


@dataclass(frozen=True)
class RandomField:
    """Draws of the field, one for each image and colour, each with variance 1."""

    series: Complex[Tensor, "b 3 modes half"]
    """Coefficients of exp(2 pi i (u x + v y) / TORUS): u ordered as by torch.fft, v from 0."""

    @classmethod
    def modes(cls, finest: int) -> int:
        """Waves on a side that are told apart by `finest` pixels an image."""
        return math.ceil(TORUS * finest)

    @classmethod
    def of(cls, white: Float[Tensor, "b modes modes 3"], correlation: Correlation) -> "RandomField":
        """The field that white noise on a grid over the torus becomes.

        On a torus a stationary covariance is circulant: the Fourier transform makes it diagonal
        (Dietrich & Newsam 1997). The law is exact between places that are whole steps of that grid
        apart, and a band-limited interpolation of it between others.
        """
        modes = white.shape[1]
        spectrum = _spectrum(correlation, modes, white)
        # modes^2 values of white noise have coefficients of variance 1 / modes^2 in this norm.
        series = torch.fft.rfft2(white.movedim(-1, 1), norm="forward") * modes
        return cls(series * spectrum.sqrt())

    def at(self, xy: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n 3"]:
        """The draws at any places: a sum over all waves, one axis after the other."""
        x, y = xy.unbind(-1)
        modes, half = self.series.shape[-2:]
        u = torch.fft.fftfreq(modes, 1 / modes, device=xy.device, dtype=xy.dtype)
        v = torch.arange(half, device=xy.device, dtype=xy.dtype)
        # A real field has every wave twice, +v and -v, but for those that are their own mirror.
        twice = torch.full_like(v, 2.0)
        twice[0] = 1.0
        if modes % 2 == 0:
            twice[-1] = 1.0
        columns, column = x.unique(return_inverse=True)
        rows, row = y.unique(return_inverse=True)
        # Pixels share their rows and columns: a table of all crossings is far smaller than a sum
        # for each pixel.
        if len(columns) * len(rows) <= 4 * x.shape[1]:
            across = _waves(columns, u) @ self.series  # (b, 3, columns, half)
            table = _real_product(across, (twice * _waves(rows, v)).mT)  # (b, 3, columns, rows)
            places = (column * len(rows) + row)[:, None].expand(-1, 3, -1)
            return table.flatten(2).gather(2, places).mT
        across = _waves(x, u)[:, None] @ self.series  # (b, 3, n, half)
        down = twice * _waves(y, v)[:, None]
        return (across.real * down.real - across.imag * down.imag).sum(-1).mT


def _waves(x: Float[Tensor, "*n"], u: Float[Tensor, " w"]) -> Complex[Tensor, "*n w"]:
    phase = (2 * math.pi / TORUS) * x[..., None] * u
    return torch.polar(torch.ones_like(phase), phase)


def _real_product(
    a: Complex[Tensor, "*b n w"], b: Complex[Tensor, "w m"]
) -> Float[Tensor, "*b n m"]:
    """The real part of a b, at half the price."""
    return a.real @ b.real - a.imag @ b.imag


def _spectrum(correlation: Correlation, modes: int, like: Tensor) -> Float[Tensor, "modes half"]:
    """Variance of each wave: the transform of the correlation with a place of the torus."""
    step = torch.arange(modes, device=like.device, dtype=like.dtype)
    # The way round that is shorter.
    apart = torch.minimum(step, modes - step) * (TORUS / modes)
    distance = torch.hypot(apart[:, None], apart)
    spectrum = torch.fft.rfft2(correlation.of(distance), norm="forward").real
    # Cut at half the torus, a correlation may keep some -1e-9.
    return spectrum.clamp(min=0)
