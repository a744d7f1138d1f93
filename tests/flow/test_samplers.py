"""Samplers against a law whose velocity field and flow map are known in closed form."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from mambaflow.flow.samplers import (
    GRIDS,
    SAMPLERS,
    CountedVelocity,
    average,
    ddim,
    heun,
    mean,
    midpoint,
    quadratic_times,
    sde,
    uniform_times,
)

CENTRE, DEVIATION = 0.4, 0.3


def exact(x, t, centre=CENTRE, deviation=DEVIATION):
    """The velocity for N(centre, deviation^2); its flow map is centre + deviation x_0."""
    t = t[:, None, None]
    variance = deviation**2 * t**2 + (1 - t) ** 2
    return centre + (deviation**2 * t - (1 - t)) / variance * (x - t * centre)


PEAKS = ((-0.5, 0.2, 0.3), (0.4, 0.3, 0.7))  # centre, deviation, share


def two_peaks(x, t):
    """The velocity for a mixture of two Gaussians: theirs, by how likely each peak is at x_t."""
    log_share, velocities = [], []
    for centre, deviation, share in PEAKS:
        time = t[:, None, None]
        variance = deviation**2 * time**2 + (1 - time) ** 2
        log_share.append(
            math.log(share) - variance.log() / 2 - (x - time * centre) ** 2 / variance / 2
        )
        velocities.append(exact(x, t, centre, deviation))
    return (torch.stack(log_share).softmax(0) * torch.stack(velocities)).sum(0)


def two_peaks_flow(noise):
    """Its flow map: in one dimension paths do not cross, so quantiles go to quantiles."""

    def below(x):
        return sum(share * stats.norm.cdf(x, c, d) for c, d, share in PEAKS)

    goals = stats.norm.cdf(noise.numpy())
    ends = [optimize.brentq(lambda x, g=g: below(x) - g, -3, 3, xtol=1e-14) for g in goals.flat]
    return torch.tensor(ends, dtype=torch.float64).view(noise.shape)


def not_at_the_end(velocity):
    def guarded(x, t):
        assert (t < 1).all(), "the velocity was asked for at t = 1"
        return velocity(x, t)

    return guarded


def normal(seed, count=30_000):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, count, 3), generator=generator, dtype=torch.float64)


def draw(step):
    return normal(1000 + step)


def law_of(sampler, steps, velocity=exact):
    """Mean and deviation of the samples, exactly: on this field a sample is affine in all the
    normal numbers that go in, so one run with a row for each of them gives every coefficient."""
    units = torch.eye(steps + 2, dtype=torch.float64)[..., None].expand(-1, -1, 3)

    def one_hot(step):
        return units[None, step + 2]

    rows = sampler(velocity, units[None, 1], uniform_times(steps), one_hot)[0, :, 0]
    return rows[0].item(), (rows[1:] - rows[0]).norm().item()


ORDERS = {
    "heun": (heun, 2),
    "midpoint": (midpoint, 2),
    "sde, cold": (functools.partial(sde, temperature=0.0), 2),
    "ddim, eta 0": (ddim, 1),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ORDERS)
def test_sampler_converges_at_its_stated_order(name, grid):
    sampler, order = ORDERS[name]
    noise = torch.linspace(-2, 2, 30, dtype=torch.float64).view(1, 10, 3)
    steps = [32, 64, 128, 256]
    truth = two_peaks_flow(noise)
    errors = [
        (sampler(not_at_the_end(two_peaks), noise, GRIDS[grid](n)) - truth).abs().max().item()
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("sampler", "kept"), [(heun, 1.031), (midpoint, 0.999)])
def test_sixteen_steps_keep_the_variance_that_the_docstrings_state(sampler, kept):
    velocity = functools.partial(exact, centre=0.0, deviation=0.03**0.5)
    one = sampler(velocity, torch.ones((1, 1, 3), dtype=torch.float64), uniform_times(16))
    assert (one.square() / 0.03).mean().item() == pytest.approx(kept, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 1.5])
def test_langevin_keeps_the_law_to_second_order(temperature):
    langevin = functools.partial(sde, temperature=temperature)
    errors = []
    for steps in (50, 100, 200):
        centre, deviation = law_of(langevin, steps, not_at_the_end(exact))
        assert centre == pytest.approx(CENTRE, abs=20 / steps**2)
        errors.append(abs(deviation / DEVIATION - 1))
    assert errors[-1] < 1e-3 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


def bare_noise(velocity, noise, times, draw, temperature=0.5):
    """The same noise without the drift along the score that balances it."""
    x, grid = noise, times.tolist()
    for step, (t, end) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x = x + (end - t) * velocity(x, x.new_full((1,), t))
        if step < len(grid) - 6:
            x = x + temperature * math.sqrt((1 - t) ** 2 - (1 - end) ** 2) * draw(step)
    return x


def test_noise_without_the_score_term_never_reaches_the_law():
    """The negative control of the test above, at four times its steps."""
    _, deviation = law_of(bare_noise, 800)
    assert deviation > 1.04 * DEVIATION


def test_langevin_with_random_numbers_keeps_a_gaussian_gaussian():
    x = (sde(exact, normal(0), uniform_times(60), draw, temperature=1.0) - CENTRE) / DEVIATION
    moments = [x.pow(power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)


def test_heat_forgets_the_noise_that_a_sample_started_from():
    noise = normal(0)
    samples = [sde(exact, noise, uniform_times(60), draw, temperature=s) for s in (0.0, 0.5, 1.0)]
    kept = [torch.corrcoef(torch.stack((noise, x)).flatten(1))[0, 1].item() for x in samples]
    assert kept[0] == pytest.approx(1) and kept[0] > kept[1] + 0.1 and kept[1] > kept[2] + 0.1


@pytest.mark.parametrize("quiet", [1, 5, 30])
def test_the_last_steps_draw_no_noise(quiet):
    asked = []

    def watched(step):
        asked.append(step)
        return torch.zeros((1, 2, 3))

    sde(exact, torch.ones((1, 2, 3)), uniform_times(20), watched, quiet_steps=quiet)
    assert asked == list(range(20 - quiet))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_tends_to_the_law_at_any_eta(eta):
    errors = []
    for steps in (100, 200, 400, 800):
        centre, deviation = law_of(functools.partial(ddim, eta=eta), steps, not_at_the_end(exact))
        assert centre == pytest.approx(CENTRE)
        errors.append(abs(deviation / DEVIATION - 1))
    assert errors[-1] < 0.01
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2, abs=0.2), "order 1"


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_ddim_step_has_exactly_the_noise_of_the_path(eta, grid):
    """For data that is one point, what is not signal in x_t is noise of deviation 1 - t; at eta
    = 1, x_s and x_t are as far apart as the chain x_s -> x_t of q makes them."""
    seen = []

    def one_point(x, t):
        seen.append((t.item(), x - t * CENTRE))
        return (CENTRE - x) / (1 - t)

    last = ddim(one_point, normal(0), GRIDS[grid](8), draw, eta=eta)
    torch.testing.assert_close(last, torch.full_like(last, CENTRE))
    for t, noise in seen:
        assert noise.std().item() == pytest.approx(1 - t, rel=0.012)
    if eta == 1:
        for (t, earlier), (s, later) in zip(seen, seen[1:], strict=False):
            covariance = (earlier * later).mean().item()
            assert covariance == pytest.approx(t / s * (1 - s) ** 2, abs=0.016 * (1 - s))


def test_the_mean_is_the_posterior_mean_in_one_call():
    velocity = CountedVelocity(exact)
    torch.testing.assert_close(mean(velocity, normal(0)), torch.full_like(normal(0), CENTRE))
    assert velocity.calls == 1


def test_an_average_of_samples_approaches_the_mean():
    samples = (heun(exact, normal(seed, 5), uniform_times(16)) for seed in range(100))
    error = average(samples) - CENTRE
    assert error.abs().max().item() < 5 * DEVIATION / math.sqrt(100)


@pytest.mark.parametrize(
    ("name", "calls"), [("heun", 20), ("midpoint", 20), ("sde", 20), ("ddim", 10), ("mean", 1)]
)
def test_every_registered_sampler_has_one_signature_and_the_calls_it_states(name, calls):
    velocity = CountedVelocity(not_at_the_end(exact))
    noise = torch.zeros((2, 4, 3))
    sampler = SAMPLERS[name]
    x = sampler(velocity, noise, quadratic_times(10), lambda step: torch.ones((2, 4, 3)))
    assert x.shape == noise.shape and x.dtype == noise.dtype and velocity.calls == calls
    assert set(SAMPLERS) == {"heun", "midpoint", "sde", "ddim", "mean"}


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_rise_from_noise_to_data(grid):
    times = GRIDS[grid](7)
    assert len(times) == 8 and times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()


def test_the_quadratic_grid_is_finest_at_the_data():
    intervals = quadratic_times(9).diff()
    assert (intervals.diff() < 0).all()
    torch.testing.assert_close(intervals[0] / intervals[-1], torch.tensor(17.0).double())


def test_samples_hold_no_graph():
    weight = torch.ones((), requires_grad=True)
    x = heun(lambda x, t: weight * x, torch.ones((1, 2, 3)), uniform_times(3))
    assert not x.requires_grad


def test_bad_requests_are_refused_by_name():
    noise = torch.zeros((1, 2, 3))
    refused = [
        (lambda: uniform_times(0), r"steps \(=0\)"),
        (lambda: heun(exact, noise, torch.tensor([0.0, 0.5, 0.4])), "must rise"),
        (lambda: ddim(exact, noise, torch.tensor([0.0, 1.5])), "must rise"),
        (lambda: sde(exact, noise, uniform_times(9)), r"draw \(=None\)"),
        (lambda: sde(exact, noise, uniform_times(9), quiet_steps=0), r"quiet_steps \(=0\)"),
        (lambda: sde(exact, noise, uniform_times(9), temperature=-1.0), r"temperature \(=-1.0\)"),
        (lambda: ddim(exact, noise, uniform_times(9), eta=2.0), r"eta \(=2.0\)"),
        (lambda: average([]), "samples"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
