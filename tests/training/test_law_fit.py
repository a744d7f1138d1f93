"""The residual's law as it is fitted: residuals drawn from a known law give that law back."""

from dataclasses import replace
from functools import cache

import pytest
import small
import torch
from torch import Tensor

from mambaflow.config import TrainConfig
from mambaflow.data.batches import Batches
from mambaflow.data.shard_reader import ShardSet
from mambaflow.models.random_field import PIXEL, Correlation, RandomField
from mambaflow.models.residual_law import NUGGET, ProcessStart, ResidualLaw, kriging
from mambaflow.models.velocity_field import VelocityField
from mambaflow.training.law_fit import (
    BOUNDS,
    IMAGES,
    QUERIES,
    Residuals,
    fit_law,
    residuals,
)

COVARIANCE = torch.tensor([[0.1, 0.06, 0.02], [0.06, 0.09, 0.05], [0.02, 0.05, 0.08]])
LAWS = [(1.5, 1.4, 0.0), (3.0, 1.8, 0.0)]  # length in pixels, exponent, amplitude
KNOWN, WINDOWS = 204, 2


def law(length: float, exponent: float, weight: float) -> ResidualLaw:
    """With an amplitude that rises with what the last window sees."""
    made = ResidualLaw(WINDOWS)
    made.set(Correlation(torch.tensor(length * PIXEL), torch.tensor(exponent)), COVARIANCE)
    with torch.no_grad():
        made.amplitude.weight[0, WINDOWS] = weight
        made.amplitude.weight[0, 0] = -weight / 2
    return made


@cache
def drawn(length: float, exponent: float, weight: float) -> Residuals:
    """What a fill of zero misses of images of this law: at random pixels of a 32 grid."""
    true, draw = law(length, exponent, weight), torch.Generator().manual_seed(0)
    order = torch.rand(IMAGES, 1024, generator=draw).argsort(-1)[:, : KNOWN + QUERIES]
    xy = (torch.stack((order % 32, order // 32), -1) + 0.5) / 32
    known_xy, query_xy = xy[:, :KNOWN], xy[:, KNOWN:]
    white = torch.randn(IMAGES, 64, 64, 3, generator=draw)
    field = RandomField.of(white, true.correlation).at(xy) @ true.colours.detach().T
    known = field[:, :KNOWN]
    # Variances of known colours, over a few powers of ten.
    seen = (1.5 * torch.randn(IMAGES, QUERIES, WINDOWS + 1, generator=draw) - 6).exp()
    weights, _ = kriging(true.correlation, known_xy, query_xy)
    amplitude = true.log_amplitude(seen).detach().exp()
    query = weights @ known + amplitude * (field[:, KNOWN:] - weights @ known)
    return Residuals(known_xy, query_xy, known, query, seen)


@cache
def fitted(length: float, exponent: float, weight: float) -> ResidualLaw:
    return fit_law(drawn(length, exponent, weight))


def profile(of: ResidualLaw) -> Tensor:
    """The correlation 1, 2 and 3 pixels apart."""
    return of.correlation.of(PIXEL * torch.arange(1, 4))


@pytest.mark.parametrize(("of", "most"), [(LAWS[0], 0.03), (LAWS[1], 0.06)])
def test_the_correlation_comes_back(of, most):
    """As far as 64 images tell it: a long and strong one is like a short and weak one there, and
    is pulled to the usual length."""
    torch.testing.assert_close(profile(fitted(*of)), profile(law(*of)), rtol=0, atol=most)


def covariance(of: ResidualLaw) -> Tensor:
    factor = of.colours.detach()
    return factor @ factor.T


@pytest.mark.parametrize(("of", "most"), [(LAWS[0], 0.05), (LAWS[1], 0.15)])
def test_the_colours_covariance_comes_back(of, most):
    error = torch.linalg.matrix_norm(covariance(fitted(*of)) - COVARIANCE)
    assert error < most * torch.linalg.matrix_norm(COVARIANCE)


@pytest.mark.parametrize("of", LAWS)
def test_the_law_of_what_kriging_leaves_comes_back(of):
    """What is drawn: the variance of places and of their neighbours, with known pixels around."""
    given, told = drawn(*of), []
    apart = torch.cdist(given.query_xy, given.query_xy) / PIXEL
    for one in (fitted(*of), law(*of)):
        _, left = given.under(one.correlation)
        variance = covariance(one).trace()
        told.append([float(variance * left[apart <= most].mean()) for most in (0.1, 1.2)])
    assert told[0] == pytest.approx(told[1], rel=0.05)


def state(of: ResidualLaw) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in of.state_dict().items()}


def surprise(of: ResidualLaw, given: Residuals) -> float:
    """Mean -log density of each place's residual, as kriging leaves it."""
    residual, left = given.under(of.correlation)
    left = left.diagonal(dim1=-2, dim2=-1)[..., None].clamp(min=NUGGET)
    zero = torch.zeros_like(residual)
    start = ProcessStart(zero, zero, left, of.log_amplitude(given.local_variances), of.colours)
    with torch.no_grad():
        return start.surprise(residual).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_amplitude_and_colours_are_as_likely_as_the_true_ones_at_least(weight):
    given, found = drawn(3.0, 1.8, weight), fitted(3.0, 1.8, weight)
    best, true = surprise(found, given), law(3.0, 1.8, weight)
    assert best < surprise(true, given) + 0.05
    # Beside the correlation that was found, which is not fitted by the likelihood.
    true.set(found.correlation, COVARIANCE)
    assert best < surprise(true, given)
    if weight:
        flat = ResidualLaw(WINDOWS)
        flat.load_state_dict(state(found))
        torch.nn.init.zeros_(flat.amplitude.weight)
        assert best < surprise(flat, given) - 0.02


def test_the_amplitude_comes_back():
    given = drawn(3.0, 1.8, 0.4)
    found, true = (
        of.log_amplitude(given.local_variances).flatten().detach()
        for of in (fitted(3.0, 1.8, 0.4), law(3.0, 1.8, 0.4))
    )
    assert true.std() > 0.2
    # A factor may stand in the amplitude or in the colours.
    assert (found - true).std() < 0.2 * true.std()


def test_without_an_amplitude_none_is_found():
    assert fitted(*LAWS[1]).log_amplitude(drawn(*LAWS[1]).local_variances).std() < 0.05


def test_two_fits_are_bitwise_equal_whatever_the_global_generator_holds():
    given, before = of_few(lambda r: r), torch.get_rng_state()
    one = state(fit_law(given))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = state(fit_law(given))
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def of_few(change) -> Residuals:
    """A few of the images, changed."""
    given = drawn(*LAWS[1])
    names = ("known_xy", "query_xy", "known", "query", "local_variances")
    return change(replace(given, **{name: getattr(given, name)[:6] for name in names}))


ODD = {
    "grey": lambda r: replace(
        r,
        known=r.known.mean(-1, keepdim=True).expand(-1, -1, 3),
        query=r.query.mean(-1, keepdim=True).expand(-1, -1, 3),
    ),
    "one colour": lambda r: replace(
        r, known=0 * r.known, query=0 * r.query, local_variances=0 * r.local_variances
    ),
    "tiny residuals": lambda r: replace(r, known=1e-6 * r.known, query=1e-6 * r.query),
    "huge residuals": lambda r: replace(r, known=1e3 * r.known, query=1e3 * r.query),
    "white residuals": lambda r: replace(
        r, query=torch.randn(r.query.shape, generator=torch.Generator().manual_seed(0))
    ),
    "one image": lambda r: replace(
        r, **{name: x[:1] for name, x in vars(r).items()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_odd_images_have_a_law_that_can_be_drawn_from(what):
    given = of_few(ODD[what])
    found = fit_law(given)
    numbers = found.numbers()
    (shortest, longest), (roughest, smoothest) = BOUNDS
    assert shortest - 0.01 <= numbers["length"] <= longest + 0.01
    assert roughest - 0.01 <= numbers["exponent"] <= smoothest + 0.01
    assert all(x.isfinite().all() for x in found.state_dict().values())
    assert 0 < numbers["variance_3"] <= numbers["variance_2"] <= numbers["variance_1"]
    if what == "grey":
        assert numbers["variance_2"] < 1e-3 * numbers["variance_1"]
        axis = torch.linalg.eigh(covariance(found)).eigenvectors[:, -1]
        torch.testing.assert_close(axis.abs(), torch.full((3,), 3**-0.5), rtol=0, atol=1e-3)


def test_residuals_are_what_the_smooth_fill_misses_of_the_first_images(tmp_path):
    shards = ShardSet(str(small.staged(tmp_path)), "train")
    torch.manual_seed(0)
    model = VelocityField(replace(small.MODEL, start="process"))
    batches = Batches(shards, small.LAYOUT, TrainConfig(batch_size=8))
    found = residuals(model, batches, images=12)
    assert len(found.known) == len(found.query) == len(found.local_variances) == 12
    for i in (0, 11):
        batch = batches[i // 8]
        row = slice(i % 8, i % 8 + 1)
        known = batch.known_xy[row], batch.known_rgb[row]
        for xy, rgb, missed in (
            (*known, found.known), (batch.query_xy[row], batch.query_rgb[row], found.query)
        ):  # fmt: skip
            fill = model.smooth(*known, xy).fill
            torch.testing.assert_close(missed[i : i + 1], rgb - fill, rtol=0, atol=1e-5)
    # The same however the batch is shared out; what a fit is given hangs on the stream alone.
    larger = Batches(shards, small.LAYOUT, TrainConfig(batch_size=4))
    again = residuals(model, larger, images=12)
    torch.testing.assert_close(again.query, found.query, rtol=0, atol=1e-5)
