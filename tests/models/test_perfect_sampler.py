"""Images drawn from the law itself: a network whose head is zero is a perfect sampler of them.

The truth is drawn by another way than the noise: by a dense Cholesky factor in float64, or where
that is too large from another series. Samples are one call of `exponential`, asked together at so
many places; that they have the truth's law is told by what the issue of density looks at: spread,
coherence, and the colours' covariance, each within 4 standard errors over independent images.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from small import Asked
from torch import Tensor

from mambaflow.config import ARCHITECTURES
from mambaflow.data.pixels import grid
from mambaflow.evaluation.calibration import Calibration
from mambaflow.flow.samplers import (
    SOLVERS,
    ddim,
    exponential,
    heun,
    midpoint,
    sde,
    times_for,
    uniform_times,
)
from mambaflow.models.random_field import PIXEL, Correlation
from mambaflow.models.residual_law import ProcessStart, kriging, stationary
from mambaflow.models.velocity_field import ConditionedField, VelocityField

SMALL = replace(ARCHITECTURES["v2"], d_model=32, num_layers=2, num_heads=4, frequencies=8)
COVARIANCE = torch.tensor([[0.1, 0.06, 0.02], [0.06, 0.09, 0.05], [0.02, 0.05, 0.08]])
KNOWN, ERRORS = 204, 4.0


def seeded(seed: int):
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


@cache
def untrained() -> VelocityField:
    """A fresh network, with a law of its own and an amplitude that differs from place to place."""
    torch.manual_seed(0)
    model = VelocityField(SMALL).eval()
    model.residual_law.set(Correlation(torch.tensor(2.5 * PIXEL), torch.tensor(1.7)), COVARIANCE)
    with torch.no_grad():
        model.residual_law.amplitude.weight.fill_(0.1)
    assert not model.head.weight.any() and not model.head.bias.any()
    return model


def known_and_unknown() -> tuple[Tensor, Tensor]:
    """A fifth of the pixels of 32 x 32, and the others, both in random order."""
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    return order[:KNOWN], order[KNOWN:]


def asked(query_xy: Tensor, images: int) -> Asked:
    """The same known pixels in each image, so that one Cholesky factor is enough."""
    xy = grid(32)[known_and_unknown()[0]]
    stripes = torch.sin(9 * xy @ torch.tensor([[1.0, 0.4, 0.0], [0.0, 1.0, 2.0]]))
    rgb = stripes * xy[:, :1]  # calm on the left, busy on the right
    return Asked(*(x.expand(images, -1, -1) for x in (xy, rgb, query_xy)))


def truth_by_cholesky(start: ProcessStart, given: Asked) -> Tensor:
    """fill + r, with r from the factor of amplitude_i amplitude_j (K_qq - K_qk K_kk^-1 K_kq)_ij,
    without a nugget, and the factor of the colours' covariance."""
    law = untrained().residual_law
    correlation = Correlation(law.length.double(), law.exponent.double())
    known, query = given.known_xy[:1].double(), given.query_xy[:1].double()
    both = torch.cat((known, query), 1)
    factor = torch.linalg.cholesky(correlation(both, both)[0] + 1e-10 * torch.eye(both.shape[1]))
    # The factor's last block is that of the conditional law.
    still = factor[KNOWN:, KNOWN:]
    white = seeded(11)(len(given.known_xy), len(still), 3, dtype=torch.float64)
    r = start.log_amplitude.double().exp() * (still @ white)
    r = r @ torch.linalg.cholesky(COVARIANCE.double()).T
    return start.fill + r.float()


def truth_by_series(start: ProcessStart, given: Asked) -> Tensor:
    """The same from a series of another torus' nodes, and solved for instead of factored."""
    law = untrained().residual_law
    white = seeded(12)(len(given.known_xy), 400, 400, 3)
    prior = stationary(white, law.correlation, given.query_xy, given.known_xy)
    n = given.query_xy.shape[1]
    among = law.correlation(given.known_xy[:1], given.known_xy[:1]).double()[0]
    across = law.correlation(given.known_xy[:1], given.query_xy[:1]).double()[0]
    guess = across.T @ torch.linalg.solve(among, prior[:, n:].double())
    r = start.log_amplitude.exp() * (prior[:, :n] - guess.float())
    return start.fill + r @ torch.linalg.cholesky(COVARIANCE).T


def statistics(residual: Tensor, start: ProcessStart, xy: Tensor) -> Tensor:
    """Of each image: spread by axis, the products of axes, and coherence at three distances, of
    the residual in units of its law: (images, 9)."""
    axes = torch.linalg.solve_triangular(
        torch.linalg.cholesky(COVARIANCE), residual.mT, upper=False
    ).mT
    axes = (axes / start.deviation).double()
    rows, columns = torch.triu_indices(3, 3)
    colours = (axes[..., rows] * axes[..., columns]).mean(1)  # (images, 6)
    # Some 700 places are enough to look at pairs of.
    some = slice(0, None, max(1, xy.shape[1] // 700))
    distance = torch.cdist(xy[0, some], xy[0, some]) / PIXEL
    near = []
    for low, high in ((0.4, 1.6), (1.6, 3.1), (3.1, 6.1)):
        pair = ((distance > low) & (distance <= high)).double()
        assert pair.any()
        found = torch.einsum("bnc,nm,bmc->b", axes[:, some], pair, axes[:, some])
        near.append(found / (3 * pair.sum()))
    return torch.cat((colours, torch.stack(near, -1)), -1)


def assert_same_law(one: Tensor, other: Tensor) -> None:
    """Two sets of images' statistics: means within so many standard errors of their difference."""
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    assert ((one.mean(0) - other.mean(0)).abs() < ERRORS * error).all(), (
        one.mean(0) - other.mean(0)
    ) / error
    assert error.max() < 0.1, "the errors say something"


def sampled(given: Asked, seed: int) -> tuple[ConditionedField, Tensor]:
    with torch.no_grad():
        field = untrained().condition(given)
        return field, exponential(field, field.noise(seeded(seed)), uniform_times(1))


@pytest.mark.parametrize("n", [50, 204, 820])
def test_at_any_density_one_call_has_the_law_of_the_truth(n):
    images = 256 if n < 100 else 64
    given = asked(grid(32)[known_and_unknown()[1][:n]], images)
    field, sample = sampled(given, n)
    truth = truth_by_cholesky(field.start, given)
    here = partial(statistics, start=field.start, xy=given.query_xy)
    assert_same_law(here(sample - field.start.fill), here(truth - field.start.fill))
    own = here(sample - field.start.fill)[:, :6]
    expected = torch.tensor([1.0, 0, 0, 1, 0, 1]).double()
    assert ((own.mean(0) - expected).abs() < ERRORS * own.std(0) / images**0.5).all()


# Of 128 x 128 places there is no dense factor.
@pytest.mark.parametrize(("side", "images", "draw"), [
    (32, 32, truth_by_cholesky), (64, 12, truth_by_series), (128, 10, truth_by_series),
])  # fmt: skip
def test_on_grids_spread_and_coherence_are_those_of_the_truth(side, images, draw):
    # Known pixels of a 32 grid are asked as well, where nothing is left: as much in both.
    given = asked(grid(side), images)
    field, sample = sampled(given, side)
    if draw is truth_by_cholesky:
        keep = known_and_unknown()[1]
        part = asked(grid(32)[keep], images)
        truth = sample.clone()
        truth[:, keep] = draw(untrained().condition(part).start, part).detach()
    else:
        truth = draw(field.start, given)
    mean = field.start.fill
    whole = [x.detach().view(images, side, side, 3) for x in (sample, mean, truth)]
    known = torch.zeros(images, side, side, dtype=torch.bool)
    if side == 32:
        known.view(images, -1)[:, known_and_unknown()[0]] = True
    of_image = [Calibration().add(*(x[i : i + 1] for x in (*whole, known))) for i in range(images)]
    told = sum(of_image, start=Calibration()).report()
    # The standard error of a ratio over images: by leaving out one at a time.
    without = [
        sum(of_image[:i] + of_image[i + 1 :], start=Calibration()).report() for i in range(images)
    ]

    def error(of) -> float:
        values = torch.tensor([of(r) for r in without]).double()
        return ((images - 1) * values.var(correction=0)).sqrt().item()

    coherence = lambda r: r["coherence"] - r["coherence_truth"]  # noqa: E731
    spread = lambda r: r["spread"]  # noqa: E731
    assert abs(spread(told) - 1) < ERRORS * error(spread)
    assert abs(coherence(told)) < ERRORS * error(coherence)
    assert error(spread) < 0.06 and error(coherence) < 0.03
    here = partial(statistics, start=field.start, xy=given.query_xy)
    assert_same_law(*(here((x - mean).detach()) for x in (sample, truth)))


@pytest.mark.parametrize("colours", [1, 2])
def test_white_noise_would_be_told_from_it(colours):
    """The negative control: of the right variance at each place, but of no correlation."""
    given = asked(grid(32)[known_and_unknown()[1][:204]], 64)
    field, sample = sampled(given, colours)
    start = field.start
    white = start.paint(start.deviation * seeded(5)(64, 204, 3))
    here = partial(statistics, start=start, xy=given.query_xy)
    with pytest.raises(AssertionError, match="tensor"):
        assert_same_law(here(sample - start.fill), here(white))


# --- Every sampler goes the same way ------------------------------------------------------------


def exact_field(n: int = 9) -> tuple[ProcessStart, Tensor]:
    """The law in float64 at n places, and a draw of it."""
    draw = torch.Generator().manual_seed(3)
    xy = torch.rand(1, 20 + n, 2, generator=draw, dtype=torch.float64)
    known, query = xy[:, :20], xy[:, 20:]
    law = Correlation(*torch.tensor((0.2, 1.7), dtype=torch.float64))
    start = ProcessStart(
        torch.sin(5 * query.sum(-1, keepdim=True) + torch.arange(3)),
        *kriging(law, known, query),
        torch.cos(5 * query[..., :1]),
        torch.linalg.cholesky(COVARIANCE.double()),
    )
    white = torch.randn(1, 32, 32, 3, generator=draw, dtype=torch.float64)
    return start, start.noise(stationary(white, law, query, known))


def velocity_of(start: ProcessStart):
    return lambda x, t: start.enter(x, t[:, None, None])[0]


@pytest.mark.parametrize("grid", ["uniform", "quadratic"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_exponential_sampler_is_exact_in_any_number_of_calls(steps, grid):
    start, noise = exact_field()
    found = exponential(velocity_of(start), noise, times_for(grid, steps))
    torch.testing.assert_close(found, start.fill + noise, rtol=0, atol=1e-12)


# On a Gaussian, where the velocity is a line in x, a third for the methods of order 2.
ORDERS = {
    "heun": (heun, 3),
    "midpoint": (midpoint, 3),
    "sde, cold": (partial(sde, temperature=0.0), 3),
    "ddim, eta 0": (partial(ddim, eta=0.0), 1),
}


@pytest.mark.parametrize("name", ORDERS)
def test_others_tend_to_the_same_image_at_their_order(name):
    """Every path ends at the fill with the noise that it began from."""
    sampler, order = ORDERS[name]
    start, noise = exact_field()
    errors = [
        (sampler(velocity_of(start), noise, uniform_times(steps)) - start.fill - noise).abs().max()
        for steps in (40, 80, 160)
    ]
    assert errors[-1] < 0.01 * noise.abs().max()
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert (coarse / fine).log2().item() == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    "sampler",
    [partial(sde, temperature=0.5), partial(sde, temperature=1.0), partial(ddim, eta=1.0)],
)
def test_samplers_that_draw_noise_of_the_law_keep_the_law(sampler):
    """A sample is affine in the noise of its beginning and of every step, with one number for each
    of them on this field: their squares add up to the variance that is kept."""
    start, _ = exact_field(1)
    steps = 800
    pattern = start.paint(start.deviation.expand(-1, -1, 3))

    number = torch.arange(steps + 1)[:, None, None]  # a row for each normal number that goes in

    def unit(of: int) -> Tensor:
        return pattern * (number == of)

    found = sampler(velocity_of(start), unit(0), uniform_times(steps), lambda step: unit(step + 1))
    kept = ((found - start.fill) / pattern).mean((1, 2)).square().sum().item()
    assert kept == pytest.approx(1, abs=0.01)


def test_in_single_precision_the_whole_field_does_so_too():
    given = asked(grid(32)[known_and_unknown()[1][:100]], 2)
    with torch.no_grad():
        field = untrained().condition(given)
        noise = field.noise(seeded(4))
        for solver, steps in (("exponential", 1), ("exponential", 5), ("midpoint", 40)):
            found = SOLVERS[solver](field, noise, uniform_times(steps))
            bound = 1e-5 if solver == "exponential" else 1e-3
            torch.testing.assert_close(found, field.start.fill + noise, rtol=0, atol=bound)


# --- One field of noise -------------------------------------------------------------------------


def middle(fine: Tensor) -> Tensor:
    """Of a 96 grid, the pixels whose centres are those of a 32 grid."""
    return fine.view(len(fine), 96, 96, 3)[:, 1::3, 1::3].flatten(1, 2)


def test_the_same_numbers_are_the_same_noise_where_two_grids_coincide():
    model = untrained()
    with torch.no_grad():
        fields = [model.condition(asked(grid(side), 1)) for side in (32, 96)]
        noises = [field.noise(seeded(6), 96) for field in fields]
        samples = [exponential(f, x, uniform_times(1)) for f, x in zip(fields, noises, strict=True)]
    for coarse, fine in (noises, samples):
        torch.testing.assert_close(coarse, middle(fine), rtol=0, atol=1e-4)
    assert noises[0].std() > 0.1
    other = fields[0].noise(seeded(7), 96)
    assert (other - noises[0]).std() > 0.1
    # Few places and many have the same noise, too.
    some = known_and_unknown()[1][:30]
    few = model.condition(asked(grid(32)[some], 1)).noise(seeded(6), 96)
    torch.testing.assert_close(few, noises[0][:, some], rtol=0, atol=1e-4)


def test_noise_at_a_known_pixel_is_next_to_none():
    """In units of the field before it was known: to the nugget."""
    known = known_and_unknown()[0]
    field = untrained().condition(asked(grid(32), 1))
    amplitude = field.start.log_amplitude.exp()
    x = (field.noise(seeded(6)) / amplitude)[0].square().mean(-1)
    assert x[known].mean() < 1e-3 * COVARIANCE.diagonal().mean()
