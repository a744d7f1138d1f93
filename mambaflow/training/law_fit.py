"""Fitting the residual's law to training images, before the first step.

The correlation in kriging's way (Cressie 1993, section 2.6): products of residuals at two places,
averaged over pairs equally far apart, beside what the law foretells for those very pairs, brought
together in least squares. The amplitude and the colours' covariance by the largest likelihood of
each place by itself.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor

from mambaflow.data.batches import Batches, PixelBatch
from mambaflow.models.random_field import PIXEL, Correlation, distances
from mambaflow.models.residual_law import (
    EXPONENT,
    LENGTH,
    NUGGET,
    ProcessStart,
    ResidualLaw,
    kriging_of,
    local_variances,
)
from mambaflow.models.velocity_field import VelocityField

# Enough: a second such set gives the same length to a few per cent; the fit takes seconds.
IMAGES, QUERIES = 64, 200
# Distances that are told apart, in pixels of 32: 0 alone, then 1, the diagonal, 2, ...
LAGS = (0.0, 0.1, 1.2, 1.6, 2.1, 2.5, 3.2, 4.3, 6.0)
# Lengths (in pixels) and exponents that are looked at. Longer ones would feel the torus that fields
# are drawn on, and near an exponent of 2 the known pixels' matrix is hardly invertible.
BOUNDS = ((0.25, 8.0), (1.0, 1.95))
# Of the squared logarithm of a length over the usual one, beside the misfit. Between places closer
# than a length a long and strong correlation is like a short and weak one (Zhang 2004): a few
# images would else choose any of them.
PULL = 1e-3
# Of any axis of colour: grey images have a residual in one alone, and F must be invertible.
LEAST_VARIANCE = 1e-5
# Of the amplitude's squared weights: windows tell nearly the same, and would cancel each other.
RIDGE = 1e-3


@dataclass(frozen=True)
class Residuals:
    """What the smooth fill misses, at the known pixels and at some queries."""

    known_xy: Float[Tensor, "b k 2"]
    query_xy: Float[Tensor, "b n 2"]
    known: Float[Tensor, "b k 3"]
    query: Float[Tensor, "b n 3"]
    local_variances: Float[Tensor, "b n a"]
    """At the queries: what the amplitude is read from."""

    @cached_property
    def apart(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distances among the known pixels, from these to the queries, and among the queries."""
        known, query = self.known_xy, self.query_xy
        return distances(known, known), distances(known, query), distances(query, query)

    @cached_property
    def lag(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " lags"]]:
        """Which of LAGS a pair of queries is apart, and how many are so; those beyond the last
        count as one more."""
        lag = torch.bucketize(self.apart[2] / PIXEL, torch.tensor(LAGS)).flatten()
        return lag, torch.bincount(lag, minlength=len(LAGS) + 1)

    def under(
        self, correlation: Correlation
    ) -> tuple[Float[Tensor, "b n 3"], Float[Tensor, "b n n"]]:
        """What kriging still leaves at the queries, and the correlation foretold of it."""
        among, across, queries = map(correlation.of, self.apart)
        weights, _ = kriging_of(among, across)
        return self.query - weights @ self.known, queries - weights @ across


def residuals(model: VelocityField, batches: Batches, images: int = IMAGES) -> Residuals:
    """Of the first images of the stream, whatever the number of workers.

    Args:
        batches: of one worker that has the whole batch.
    """
    steps = range(math.ceil(images / batches.config.batch_size))
    parts = [_missed(model, batches[step]) for step in steps]
    joined = (torch.cat(tensors)[:images] for tensors in zip(*parts, strict=True))
    return Residuals(*joined)


@torch.no_grad()
def _missed(model: VelocityField, batch: PixelBatch) -> tuple[Tensor, ...]:
    xy, rgb = batch.query_xy[:, :QUERIES], batch.query_rgb[:, :QUERIES]
    known = batch.known_xy, batch.known_rgb
    query = model.smooth(*known, xy)
    missed = model.missed(*known, *known), rgb - query.fill
    return known[0], xy, *missed, local_variances(query.unexplained, *known, xy)


def fit_law(given: Residuals) -> ResidualLaw:
    """The law that residuals have; a function of them alone."""
    with torch.random.fork_rng(devices=[]):  # a layer draws its weights even if they are made zero
        law = ResidualLaw(given.local_variances.shape[-1] - 1)
    correlation = _fit_correlation(given)
    residual, left = given.under(correlation)
    left = left.diagonal(dim1=-2, dim2=-1)[..., None].clamp(min=NUGGET)
    law.set(correlation, _covariance(residual, left))
    _fit_amplitude(law, given, residual, left)
    # Again, now that places of small amplitude have their say.
    amplitude = law.log_amplitude(given.local_variances).detach().exp()
    law.set(correlation, _covariance(residual, left * amplitude.square()))
    return law


def _fit_correlation(given: Residuals) -> Correlation:
    start = np.array([math.log(LENGTH), EXPONENT])

    def misfit(numbers: np.ndarray) -> float:
        found, foretold = _profiles(given, _correlation(numbers))
        variance = (found @ foretold) / (foretold @ foretold)
        error = (found - variance * foretold).square().sum() / found.square().sum()
        return float(error) + PULL * (numbers[0] - start[0]) ** 2

    (shortest, longest), exponents = BOUNDS
    bounds = [(math.log(shortest), math.log(longest)), exponents]
    if not given.query.any():  # nothing is left over, as of images of one colour
        return _correlation(start)
    # Without slopes: 40 looks at two numbers are enough, and sums in float32 have no finer ones.
    best = minimize(misfit, start, method="Nelder-Mead", bounds=bounds,
                    options={"maxfev": 40, "xatol": 5e-3, "fatol": 1e-7}).x  # fmt: skip
    # Rounded, so that the last bits of sums, which other machines add up otherwise, do not reach a
    # run's weights.
    length, exponent = round(math.exp(best[0]), 2), round(best[1], 2)
    return _correlation(np.array([math.log(length), exponent]))


def _correlation(numbers: np.ndarray) -> Correlation:
    length, exponent = math.exp(numbers[0]) * PIXEL, float(numbers[1])
    return Correlation(torch.tensor(length), torch.tensor(exponent))


def _profiles(
    given: Residuals, correlation: Correlation
) -> tuple[Float[Tensor, " lags"], Float[Tensor, " lags"]]:
    """Products of residuals and their correlation as foretold, averaged over pairs of each lag."""
    residual, left = given.under(correlation)
    products = residual @ residual.mT / 3  # the mean over colours
    lag, pairs = given.lag
    sums = [
        torch.bincount(lag, weights=values.flatten().double(), minlength=len(LAGS) + 1)
        for values in (products, left)
    ]
    some = (pairs > 0) & (torch.arange(len(pairs)) < len(LAGS))
    found, foretold = ((total / pairs)[some] for total in sums)
    return found, foretold


def _covariance(
    residual: Float[Tensor, "b n 3"], variance: Float[Tensor, "b n 1"]
) -> Float[Tensor, "3 3"]:
    """Of the colours, where the field would have variance 1."""
    flat = (residual * variance.rsqrt()).flatten(0, 1).double()
    covariance = flat.mT @ flat / len(flat) + LEAST_VARIANCE * torch.eye(3)
    return covariance.float()


def _fit_amplitude(
    law: ResidualLaw,
    given: Residuals,
    residual: Float[Tensor, "b n 3"],
    left: Float[Tensor, "b n 1"],
) -> None:
    """Have the amplitude's line the largest likelihood."""
    zero = torch.zeros_like(residual)
    layer = law.amplitude
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def surprise() -> Tensor:
        optimiser.zero_grad()
        amplitude = law.log_amplitude(given.local_variances)
        # The start of this law around 0, as in training.
        start = ProcessStart(zero, zero, left, amplitude, law.colours.detach())
        value = start.surprise(residual).mean() + RIDGE * layer.weight.square().sum()
        value.backward()
        return value

    optimiser.step(surprise)
    for p in layer.parameters():
        p.data = p.data.mul(1000).round() / 1000  # rounded as the correlation is
        p.grad = None
