"""Samplers against a law whose velocity field and flow map are known in closed form."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from mambaflow.flow.samplers import (
    GRIDS,
    SOLVERS,
    CountedVelocity,
    ddim,
    exponential,
    heun,
    mean,
    midpoint,
    quadratic_times,
    sde,
    times_for,
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
    "exponential": (exponential, 2),
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
        (sampler(not_at_the_end(two_peaks), noise, times_for(grid, n)) - truth).abs().max().item()
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


def test_temperature_forgets_the_noise_that_a_sample_started_from():
    noise = normal(0)
    samples = [sde(exact, noise, uniform_times(60), draw, temperature=s) for s in (0.0, 0.5, 1.0)]
    kept = [torch.corrcoef(torch.stack((noise, x)).flatten(1))[0, 1].item() for x in samples]
    assert kept[0] == pytest.approx(1) and kept[0] > kept[1] + 0.1 and kept[1] > kept[2] + 0.1


@pytest.mark.parametrize("noiseless", [1, 5, 30])
def test_the_last_steps_draw_no_noise(noiseless):
    asked = []

    def watched(step):
        asked.append(step)
        return torch.zeros((1, 2, 3))

    sde(exact, torch.ones((1, 2, 3)), uniform_times(20), watched, noiseless_steps=noiseless)
    assert asked == list(range(20 - noiseless))


def test_without_noise_langevin_is_heuns_method_to_the_bit():
    noise = normal(0, 20).float()
    expected = heun(two_peaks, noise, uniform_times(7))
    assert torch.equal(sde(two_peaks, noise, uniform_times(7), temperature=0.0), expected)
    assert torch.equal(sde(two_peaks, noise, uniform_times(7), noiseless_steps=7), expected)


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

    last = ddim(one_point, normal(0), times_for(grid, 8), draw, eta=eta)
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


@pytest.mark.parametrize("field", [exact, two_peaks])
def test_one_exponential_call_is_the_noise_around_the_posterior_mean(field):
    """Whatever the velocity: the law of the answer is that of the noise."""
    velocity = CountedVelocity(field)
    noise = normal(0, 20)
    found = exponential(velocity, noise, uniform_times(1))
    assert velocity.calls == 1
    torch.testing.assert_close(found, mean(field, noise) + noise)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_exponential_calls_are_exact_where_the_noise_has_the_law_of_what_is_left(steps, grid):
    """With the deviation of the noise its own, every path ends the noise away from the centre."""
    noise, velocity = normal(0, 20), functools.partial(exact, deviation=1.0)
    found = exponential(not_at_the_end(velocity), noise, times_for(grid, steps))
    torch.testing.assert_close(found, CENTRE + noise, rtol=0, atol=1e-12)


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_no_solver_asks_for_the_end_whatever_the_dtype_grid_and_steps(solver, grid, dtype):
    asked = []

    def recorded(x, t):
        assert t.dtype == x.dtype == torch.promote_types(dtype, torch.float32)
        assert t.shape == (2,) and (t[0] == t).all() and 0 <= t[0] < 1
        asked.append(t[0].item())
        return exact(x, t)

    noise = torch.linspace(-1, 1, 24, dtype=dtype).view(2, 4, 3)
    for steps in range(1, 21):
        asked.clear()
        x = solver(recorded, noise, times_for(grid, steps), lambda step: torch.ones((2, 4, 3)))
        assert x.shape == noise.shape and x.dtype == dtype and x.isfinite().all()
        assert len(asked) == solver.calls(steps)
        assert min(asked) == 0 and asked == sorted(asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_time_that_rounds_to_one_is_asked_just_below(solver, dtype):
    """In float32 all after 1 - 3e-8 is 1; so is in float64 the middle of the last two numbers."""
    times = torch.tensor([0.0, 0.5, 1 - 1e-9, 1 - 2**-53, 1.0], dtype=torch.float64)
    noise = torch.linspace(-1, 1, 12, dtype=dtype).view(1, 4, 3)
    x = solver(not_at_the_end(exact), noise, times, lambda step: torch.zeros((1, 4, 3)))
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_half_precision_rounds_the_answer_and_nothing_before_it(solver, dtype):
    noise = torch.linspace(-1, 1, 24).view(2, 4, 3).to(dtype)
    runs = [
        solver(exact, given, uniform_times(12), lambda step: torch.ones((2, 4, 3)))
        for given in (noise, noise.float())
    ]
    assert torch.equal(runs[0], runs[1].to(dtype))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_budget_of_calls_is_kept_and_used(solver):
    for nfe in range(solver.calls(1), 40):
        steps = solver.steps_for(nfe)
        velocity = CountedVelocity(exact)
        solver(velocity, torch.zeros((1, 2, 3)), uniform_times(steps), draw_zeros)
        assert velocity.calls == solver.calls(steps) <= nfe
        assert not solver.takes_times or solver.calls(steps + 1) > nfe


def draw_zeros(step):
    return torch.zeros((1, 2, 3))


def test_the_registry_states_what_each_solver_costs_and_takes():
    facts = {
        s.name: (s.calls(10), s.steps_for(21), s.draws_noise, s.settings) for s in SOLVERS.values()
    }
    assert facts == {
        "mean": (1, 1, False, {}),
        "exponential": (10, 21, False, {}),
        "ddim": (10, 21, True, {"eta": 0.0}),
        "sde": (20, 10, True, {"temperature": 0.5, "noiseless_steps": 5}),
        "midpoint": (20, 10, False, {}),
        "heun": (20, 10, False, {}),
    }
    assert list(SOLVERS) == list(facts) and len({s.title for s in SOLVERS.values()}) == len(facts)


NOISIEST = {"temperature": 1.0, "noiseless_steps": 1, "eta": 1.0}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_solver_draws_noise_if_and_only_if_it_says_so(solver):
    asked = []
    settings = {name: NOISIEST[name] for name in solver.settings}
    noise = torch.zeros((1, 2, 3))
    solver(exact, noise, uniform_times(4), lambda s: asked.append(s) or draw_zeros(s), **settings)
    assert asked == (list(range(3)) if solver.draws_noise else [])
    if solver.draws_noise:
        with pytest.raises(ValueError, match=r"draw \(=None\) must give"):
            solver(exact, noise, uniform_times(4), **settings)


def test_a_solver_hands_its_settings_on_and_refuses_those_of_others():
    noise, times = normal(0, 5), uniform_times(8)

    def fixed(step):
        return normal(step, 5)

    expected = sde(exact, noise, times, fixed, temperature=1.5, noiseless_steps=2)
    found = SOLVERS["sde"](exact, noise, times, fixed, temperature=1.5, noiseless_steps=2)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="sde has no setting 'eta'; valid: temperature, noisel"):
        SOLVERS["sde"](exact, noise, times, fixed, eta=0.3)
    with pytest.raises(ValueError, match="heun has no setting 'temperature'; valid: none"):
        SOLVERS["heun"](exact, noise, times, temperature=0.3)


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_rise_from_noise_to_data(grid):
    times = times_for(grid, 7)
    assert len(times) == 8 and times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()


def test_the_quadratic_grid_is_finest_at_the_data():
    intervals = quadratic_times(9).diff()
    assert (intervals.diff() < 0).all()
    torch.testing.assert_close(intervals[0] / intervals[-1], torch.tensor(17.0).double())


def test_samples_hold_no_graph():
    weight = torch.ones((), requires_grad=True)
    x = heun(lambda x, t: weight * x, torch.ones((1, 2, 3)), uniform_times(3))
    assert not x.requires_grad


NOISE = torch.zeros((2, 4, 3))
NAN, INF = math.nan, math.inf


def asking(solver, noise=NOISE, times=(0, 0.5, 0.8, 1), velocity=exact, draw=None, **settings):
    return SOLVERS[solver](velocity, noise, torch.tensor(times), draw, **settings)


REFUSED = {
    "no steps": (lambda: uniform_times(0), r"steps \(=0\) must be a whole number, at least 1"),
    "half a step": (lambda: quadratic_times(2.5), r"steps \(=2.5\)"),
    "steps NaN": (lambda: times_for("uniform", NAN), r"steps \(=nan\)"),
    "grid": (lambda: times_for("cubic", 5), "unknown grid 'cubic'; valid: uniform, quadratic"),
    "calls of no steps": (lambda: SOLVERS["heun"].calls(0), r"steps \(=0\)"),
    "too few calls": (lambda: SOLVERS["heun"].steps_for(1), r"nfe \(=1\) must be at least 2"),
    "calls NaN": (lambda: SOLVERS["ddim"].steps_for(NAN), r"nfe \(=nan\)"),
    "exponential from the middle": (
        lambda: asking("exponential", times=(0.1, 0.5, 1)),
        r"times \(=\[0.1\d*, 0.5, 1.0\]\) must go from 0 to 1: .*; use uniform_times\(steps\)",
    ),
    "exponential to the middle": (
        lambda: asking("exponential", times=(0, 0.5)),
        r"times \(=\[0.0, 0.5\]\) must go from 0",
    ),
    "no draw": (lambda: asking("sde", noiseless_steps=1), r"draw \(=None\)"),
    **{
        f"times {times}, {name}": (lambda n=name, t=times: asking(n, times=t), "must rise|be a row")
        for times in (
            (0, 0.5, 0.4),
            (0, 0.5, 0.5),
            (0, 1.5),
            (-0.1, 1),
            (0, NAN, 1),
            (NAN, 1),
            (0, INF),
            (0.0,),
            (),
            ((0.0, 1.0), (0.0, 1.0)),
        )
        for name, solver in SOLVERS.items()
        if solver.takes_times
    },
    **{
        f"{name} {value}": (
            lambda s=solver, n=name, v=value: asking(s, **{n: v}),
            rf"{name} \(={value}\) must",
        )
        for solver, name, values in (
            ("sde", "temperature", (NAN, INF, -INF, -0.1, 10.1)),
            ("sde", "noiseless_steps", (NAN, INF, 0, -1, 1.5)),
            ("ddim", "eta", (NAN, INF, -INF, -0.1, 1.1)),
        )
        for value in values
    },
    **{
        f"noise of integers, {name}": (
            lambda n=name: asking(n, noise=NOISE.long()),
            r"noise \(of torch.int64\) must hold floating-point numbers; use noise.float\(\)",
        )
        for name in SOLVERS
    },
    **{
        f"a velocity for one image, {name}": (
            lambda n=name: asking(n, velocity=lambda x, t: x[:1]),
            r"velocity's answer \(of shape \(1, 4, 3\)\) must have the shape of noise \(=\(2, 4, 3",
        )
        for name in SOLVERS
    },
    **{
        f"a draw for one image, {name}": (
            lambda n=name, s=solver: asking(
                n, draw=lambda step: NOISE[:1], **{k: NOISIEST[k] for k in s.settings}
            ),
            r"draw's answer \(of shape \(1, 4, 3\)\) must have the shape of noise",
        )
        for name, solver in SOLVERS.items()
        if solver.draws_noise
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_are_refused_by_name(what, without_shape_checks):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()
