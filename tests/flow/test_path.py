import math
import re

import pytest
import torch
from scipy import stats

from mambaflow.flow import path


def pairs(count=4096, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 2, 3)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    data = 0.3 + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise, data


def test_path_leads_from_noise_to_data_at_the_target_velocity():
    x_0, x_1 = pairs(5)
    zeros, ones = torch.zeros(5).double(), torch.ones(5).double()
    assert torch.equal(path.interpolate(x_0, x_1, zeros), x_0)
    assert torch.equal(path.interpolate(x_0, x_1, ones), x_1)
    t = torch.linspace(0.1, 0.9, 5).double()
    _, derivative = torch.func.jvp(lambda t: path.interpolate(x_0, x_1, t), (t,), (ones,))
    torch.testing.assert_close(derivative, path.target_velocity(x_0, x_1))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("law", path.LAWS)
def test_times_have_the_stated_mass_at_zero_and_the_stated_law_elsewhere(share, law):
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    t = path.sample_times(u, share, law)
    assert (t >= 0).all() and (t < 1).all()
    assert (t == 0).double().mean().item() == pytest.approx(share, abs=1e-4)
    rest = t[t > 0].numpy()
    if len(rest):
        expected = {"uniform": stats.uniform.cdf, "logit_normal": logit_normal_cdf}[law]
        assert stats.kstest(rest, expected).statistic < 1e-3


def logit_normal_cdf(t):
    return stats.norm.cdf(stats.logistic.ppf(t))


@pytest.mark.parametrize("weighting", path.WEIGHTINGS)
@pytest.mark.parametrize("time", [0.0, 0.4, 0.95])
def test_least_loss_at_any_time_is_the_conditional_mean_velocity(weighting, time):
    x_0, x_1 = pairs(20_000)
    t = torch.full((len(x_0),), time, dtype=torch.float64)
    x_t = path.interpolate(x_0, x_1, t)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], lr=1, max_iter=50, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        value = path.loss(weights[0] + weights[1] * x_t, x_0, x_1, t, weighting)
        value.backward()
        return value

    optimizer.step(closure)
    variance = 0.25 * time**2 + (1 - time) ** 2  # of x_t, for data N(0.3, 0.25)
    slope = (0.25 * time - (1 - time)) / variance
    expected = torch.tensor([0.3 - slope * 0.3 * time, slope]).double()
    torch.testing.assert_close(weights.detach(), expected, atol=0.02, rtol=0)


def test_data_weighting_is_the_loss_of_the_data_that_the_velocity_implies():
    x_0, x_1 = pairs(64)
    t = torch.linspace(0, 1, 64).double()
    velocity = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3)).double()
    implied = path.interpolate(x_0, x_1, t) + (1 - t)[:, None, None] * velocity
    error = (implied - x_1).square().mean((1, 2)) / (1 - t).clamp(min=0.1)
    torch.testing.assert_close(path.loss(velocity, x_0, x_1, t, "data"), error.mean())


def test_velocity_weighting_is_the_plain_mean_squared_error():
    x_0, x_1 = pairs(64)
    expected = torch.nn.functional.mse_loss(x_0, x_1 - x_0)
    actual = path.loss(x_0, x_0, x_1, torch.rand(64).double(), "velocity")
    torch.testing.assert_close(actual, expected)


X = torch.zeros(4, 5, 3)
T = torch.zeros(4)
OF_NOISE_AND_DATA = {
    "interpolate": lambda x_0, x_1: path.interpolate(x_0, x_1, T),
    "target_velocity": path.target_velocity,
    "loss": lambda x_0, x_1: path.loss(X, x_0, x_1, T),
}
AT_TIMES = {
    "interpolate": lambda t: path.interpolate(X, X, t),
    "loss": lambda t: path.loss(X, X, X, t),
}
UNLIKE = {"one image": X[:1], "one point": X[:, :1], "one channel": X[..., :1], "a row": X[0]}


@pytest.mark.parametrize("other", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("call", OF_NOISE_AND_DATA.values(), ids=OF_NOISE_AND_DATA)
def test_noise_and_data_are_never_broadcast(call, other, without_shape_checks):
    shape = re.escape(str(tuple(other.shape)))
    with pytest.raises(ValueError, match=rf"x_1 \(of shape {shape}\) must have the shape of x_0"):
        call(X, other)
    with pytest.raises(ValueError, match=rf"must have the shape of x_0 \(={shape}\)"):
        call(other, X)


@pytest.mark.parametrize("other", UNLIKE.values(), ids=UNLIKE)
def test_the_loss_does_not_broadcast_a_velocity(other, without_shape_checks):
    with pytest.raises(ValueError, match=r"velocity \(of shape .*\) must have the shape of x_0"):
        path.loss(other, X, X, T)


@pytest.mark.parametrize("t", [T[:1], T[0], T[:, None], T.long()], ids=["1", "()", "4 x 1", "int"])
@pytest.mark.parametrize("call", AT_TIMES.values(), ids=AT_TIMES)
def test_every_image_has_its_own_time(call, t, without_shape_checks):
    with pytest.raises(ValueError, match=r"t \(of shape .*\) must hold one time for each of 4"):
        call(t)


@pytest.mark.parametrize("call", OF_NOISE_AND_DATA.values(), ids=OF_NOISE_AND_DATA)
def test_bytes_are_refused_since_their_difference_would_wrap_around(call, without_shape_checks):
    with pytest.raises(ValueError, match=r"x_1 \(of torch.uint8\) must hold .*; use x_1.float"):
        call(X, X.byte())


def test_a_loss_of_nothing_is_refused_instead_of_nan():
    with pytest.raises(ValueError, match=r"x_0 \(of shape \(0, 5, 3\)\) must hold a colour"):
        path.loss(X[:0], X[:0], X[:0], T[:0])


@pytest.mark.parametrize("share", [1.5, -0.1, math.nan, math.inf])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"share_at_zero \(={share}\) must be in \[0, 1\]; use"):
        path.sample_times(T, share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_times_are_made_in_no_less_than_float32(dtype, without_shape_checks):
    with pytest.raises(ValueError, match=rf"u \(of {dtype}\) must be float32 or float64"):
        path.sample_times(T.to(dtype), 0.1)


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="time law 'cosine'; valid: uniform, logit_normal"):
        path.sample_times(T, 0.1, "cosine")
    with pytest.raises(ValueError, match="weighting 'noise'; valid: velocity, data"):
        path.loss(X, X, X, T, "noise")
