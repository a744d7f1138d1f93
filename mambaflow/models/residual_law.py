"""The law of what a fill leaves over: a Gaussian process that is zero at the known pixels.

Around a good fill mu the truth is mu + r, and r is a correlated field: a blob too bright here, an
edge a pixel to the left there. Here r at place i is amplitude_i g_i F, with g a stationary field
for each of three axes of colour, conditioned on being 0 at the known pixels (Rasmussen & Williams
2006, eq. 2.19), F the colours' own axes, and the amplitude read from the known pixels around.

Noise is drawn from that same law, independently: x_0 ~ r, as in functional flow matching (Kerrigan
et al. 2023) and FlowNP (Hamad & Rosenbaum 2025), there without what is known. Then at every time

    x_t - t mu = t r + (1 - t) x_0      has the covariance      (t^2 + (1 - t)^2) Cov[r],

a multiple of one matrix, which cancels wherever it would have to be inverted: what is left are
numbers for each query, the same whatever else is asked beside it. The law of a sample thus agrees
at 200 places and at 65,536. With white noise instead, t^2 Cov[r] + (1 - t)^2 I would have to be
inverted at every call, and more queries would show more of r at the same t.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.kernels.linear import Linear
from mambaflow.models.random_field import PIXEL, Correlation, RandomField

# Variance of a known pixel's own error, for a field of variance 1: a byte is rounded by 2 / 255 /
# sqrt(12), 5e-5 of the usual residual's variance. It keeps the known pixels' matrix invertible.
NUGGET = 5e-5
# Of a residual on CIFAR-10, rgb in [-1, 1]; `training.law_fit` replaces all three by those of the
# data. Length in pixels of 32.
VARIANCE, LENGTH, EXPONENT = 0.1, 2.5, 1.7
# Under the logarithm of an unexplained variance, which may be 0: two steps of a byte, squared.
FLOOR = 1e-4
# Known pixels that a window around a query is made for.
NEAREST = 6
# Of a log amplitude, either way: amplitudes lie between 1/7 and 7.
LARGEST = 2.0


class ResidualLaw(nn.Module):
    """The numbers of the law, and the amplitude's network."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.length: Tensor
        self.exponent: Tensor
        # Buffers: fitted before training, kept in checkpoints, not moved by the optimiser.
        self.register_buffer("length", torch.tensor(LENGTH * PIXEL))
        self.register_buffer("exponent", torch.tensor(EXPONENT))
        # F as its lower triangle, with the logarithm of the diagonal: F F' is positive definite
        # whatever is learned.
        self.log_colours = nn.Parameter(torch.eye(3) * 0.5 * math.log(VARIANCE))
        # log amplitude: a line in what planes under each window leave unexplained of the known
        # colours, in how much the nearest differ, and in the squares of these.
        self.amplitude = Linear(2 * (windows + 1), 1)
        nn.init.zeros_(self.amplitude.weight)
        nn.init.zeros_(self.amplitude.bias)

    @property
    def correlation(self) -> Correlation:
        """Of the field before anything is known."""
        return Correlation(self.length, self.exponent)

    @property
    def colours(self) -> Float[Tensor, "3 3"]:
        """F: the covariance of the three colours at amplitude 1 is F F'."""
        return self.log_colours.tril(-1) + torch.diag(self.log_colours.diagonal().exp())

    @torch.no_grad()
    def set(self, correlation: Correlation, covariance: Float[Tensor, "3 3"]) -> None:
        """Take numbers: the correlation, and the covariance of the colours at amplitude 1."""
        self.length.copy_(correlation.length)
        self.exponent.copy_(correlation.exponent)
        factor = torch.linalg.cholesky(covariance)
        self.log_colours.copy_(factor.tril(-1) + torch.diag(factor.diagonal().log()))

    def numbers(self) -> dict[str, float]:
        """What the law has learned, for curves: length in pixels of 32, variances by axis."""
        factor = self.colours.detach().double()
        variances = torch.linalg.eigvalsh(factor @ factor.mT).flip(0).tolist()
        named = {f"variance_{i + 1}": v for i, v in enumerate(variances)}
        return {
            "length": self.length.item() / PIXEL, "exponent": self.exponent.item(), **named
        }  # fmt: skip

    def log_amplitude(self, local_variances: Float[Tensor, "b n a"]) -> Float[Tensor, "b n 1"]:
        """Of each query, from the variances of known colours around it: see `local_variances`."""
        # Half the logarithm, of a deviation as the amplitude is; around 0 for usual images.
        seen = 0.5 * (local_variances.detach().clamp(min=0) + FLOOR).log() + 3
        raw = self.amplitude(torch.cat((seen, seen.square()), -1)).float()
        # Known colours like none in training must not make noise of any size.
        return LARGEST * torch.tanh(raw / LARGEST)


@torch.no_grad()
def local_variances(
    unexplained: Float[Tensor, "b n h"],
    known_xy: Float[Tensor, "b k 2"],
    known_rgb: Float[Tensor, "b k 3"],
    query_xy: Float[Tensor, "b n 2"],
) -> Float[Tensor, "b n a"]:
    """Variances of known colours around each query, from known pixels alone: what planes leave
    `unexplained`, and last that under a Gaussian window as wide as the nearest few are far."""
    with torch.autocast(known_xy.device.type, enabled=False):
        apart = torch.cdist(query_xy, known_xy, compute_mode="donot_use_mm_for_euclid_dist")
        squares = apart.square()
        # Windows of one width hold two known pixels here and ten there. The mean distance of the
        # nearest changes steadily from place to place, and so does the amplitude.
        nearest = squares.topk(min(NEAREST, squares.shape[-1]), largest=False).values
        window = (-squares / nearest.mean(-1, keepdim=True).clamp(min=PIXEL**2)).softmax(-1)
        mean = window @ known_rgb
        nearby = (window @ known_rgb.square() - mean.square()).sum(-1, keepdim=True)
    return torch.cat((unexplained, nearby), -1)


@torch.no_grad()
def kriging(
    correlation: Correlation, known_xy: Float[Tensor, "b k 2"], query_xy: Float[Tensor, "b n 2"]
) -> tuple[Float[Tensor, "b n k"], Float[Tensor, "b n 1"]]:
    """Weights W with E[g | g at the known pixels] = W g_known, and the variance that is left.

    Rasmussen & Williams 2006, eq. 2.23 and 2.24, for a field g of variance 1; by Cholesky of the
    known pixels alone, O(k^3 + k^2 n), linear in the queries.
    """
    # Half precision would make the matrix of neighbours indefinite.
    with torch.autocast(known_xy.device.type, enabled=False):
        return kriging_of(correlation(known_xy, known_xy), correlation(known_xy, query_xy))


def kriging_of(
    among: Float[Tensor, "b k k"], across: Float[Tensor, "b k n"]
) -> tuple[Float[Tensor, "b n k"], Float[Tensor, "b n 1"]]:
    """`kriging`, of the correlations among the known pixels and across to the queries. `among` gets
    its nugget in place: a copy would be one more pass over it at every step."""
    among.diagonal(dim1=-2, dim2=-1).add_(NUGGET)
    weights = torch.cholesky_solve(across, torch.linalg.cholesky(among))
    left = 1 - (weights * across).sum(1)
    # At a known pixel the difference of two ones: rounding may take it below zero.
    return weights.mT, left.clamp(min=NUGGET)[..., None]


def _along_axes(
    colours: Float[Tensor, "b n 3"], factor: Float[Tensor, "3 3"]
) -> Float[Tensor, "b n 3"]:
    """Amounts along the axes F: the inverse of `paint`."""
    return torch.linalg.solve_triangular(factor.mT, colours, upper=True, left=False)


def stationary(
    white: Float[Tensor, "b modes modes 3"],
    correlation: Correlation,
    query_xy: Float[Tensor, "b n 2"],
    known_xy: Float[Tensor, "b k 2"],
) -> Float[Tensor, "b m 3"]:
    """One field at the queries and, after them, at the known pixels."""
    field = RandomField.of(white, correlation)
    # Apart: places of a grid share rows and columns, and known pixels lie on another grid when an
    # image is enlarged.
    return torch.cat((field.at(query_xy), field.at(known_xy)), 1)


@dataclass(frozen=True)
class ProcessStart:
    """The law at some queries, given the known pixels: x_1 = fill + r."""

    fill: Float[Tensor, "b n 3"]
    weights: Float[Tensor, "b n k"]
    left: Float[Tensor, "b n 1"]
    """Variance of the field that the known pixels leave."""
    log_amplitude: Float[Tensor, "b n 1"]
    colours: Float[Tensor, "3 3"]

    @property
    def deviation(self) -> Float[Tensor, "b n 1"]:
        """Of each of the three axes of r."""
        # Detached, as the colours are in all but the likelihood: the flow's loss would else be made
        # small by making the noise so.
        return self.left.sqrt() * self.log_amplitude.detach().exp()

    def noise(self, prior: Float[Tensor, "b m 3"]) -> Float[Tensor, "b n 3"]:
        """A draw of r from a draw of the stationary field at queries and known pixels.

        Matheron's rule (Wilson et al. 2020, eq. 9): a draw of the field minus what its own values
        at the known pixels would foretell is a draw of the field that is 0 there.
        """
        queries = self.fill.shape[1]
        conditioned = prior[:, :queries] - self.weights @ prior[:, queries:]
        return self.log_amplitude.detach().exp() * conditioned @ self.colours.detach().mT

    def enter(
        self, x: Float[Tensor, "b n 3"], t: Float[Tensor, "b 1 1"]
    ) -> tuple[Float[Tensor, "b n 3"], Float[Tensor, "b n 3"], Float[Tensor, "b n 1"]]:
        """The exact velocity of this law, and what the network sees.

        E[x_1 | x_t] = mu + t / s^2 (x_t - t mu) and Cov[x_1 | x_t] = (1 - t)^2 / s^2 Cov[r] with
        s^2 = t^2 + (1 - t)^2; the velocity is (E[x_1 | x_t] - x_t) / (1 - t) with the factor 1 - t
        cancelled. The preconditioning of EDM (Karras et al. 2022, section 5), given what is known.

        Returns:
            the velocity; x_t standardised, of unit variance and uncorrelated colours at every t;
            the size of the network's output, to be turned into colours by `paint`.
        """
        size = (t.square() + (1 - t).square()).sqrt()  # between sqrt(1/2) and 1
        apart = x - t * self.fill
        # At t = 0 this is fill - x: the posterior mean x + v is the fill, whatever the noise.
        velocity = self.fill + (2 * t - 1) / size.square() * apart
        whitened = _along_axes(apart, self.colours.detach())
        return velocity, whitened / (self.deviation * size), self.deviation / size

    def paint(self, axes: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 3"]:
        """Colours of amounts along the three axes."""
        return axes @ self.colours.detach().mT

    def excess(self, x: Float[Tensor, "b n 3"]) -> Float[Tensor, ""]:
        """The mean square of x_0 in units of its law: 1 for a draw of it."""
        return (_along_axes(x, self.colours.detach()) / self.deviation).square().mean()

    def surprise(self, residual: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 1"]:
        """-log density of each query's residual by itself, less a constant: what amplitude and
        colours are trained by. The residual is taken as it is."""
        whitened = _along_axes(residual.detach(), self.colours)
        log_variance = self.left.log() + 2 * self.log_amplitude
        squares = whitened.square().sum(-1, keepdim=True) * (-log_variance).exp()
        return 0.5 * (squares + 3 * log_variance) + self.colours.diagonal().log().sum()
