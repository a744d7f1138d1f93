"""From noise to colours: a grid is a tensor of times, a sampler a loop over it.

Every sampler is `(velocity, noise, times, draw) -> colours` with the velocity a plain callable.
`draw(step)` gives the standard normal noise of one step: randomness is an argument. SOLVERS says
what each one costs and takes; reports, benchmarks and jobs read it there, so that a sampler is
added in this file alone.

All compute in the dtype of the noise, in float32 at least: in bfloat16 the last times of a grid
round to 1. None asks for the velocity at t = 1, where E[x_1 | x_t] - x_t and 1 - t vanish together.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor

from mambaflow.checks import lookup, require

Velocity = Callable[[Float[Tensor, "b n 3"], Float[Tensor, " b"]], Float[Tensor, "b n 3"]]
Draw = Callable[[int], Float[Tensor, "b n 3"]]


def uniform_times(steps: int) -> Float[Tensor, " times"]:
    """`steps` equal intervals from noise (0) to data (1)."""
    _require_count("steps", steps)
    # In float64 whatever the noise is in: a step is the difference of two times.
    return torch.linspace(0, 1, int(steps) + 1, dtype=torch.float64)


def quadratic_times(steps: int) -> Float[Tensor, " times"]:
    """Intervals that shrink toward the data, 1 - (1 - u)^2.

    The quadratic grid of Song, Meng & Ermon 2021 (appendix D.2: tau_i ~ i^2, counted from the
    data), and not u^2, whose longest interval is where the fine detail is decided.
    """
    return 1 - (1 - uniform_times(steps)).square()


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "uniform": uniform_times,
    "quadratic": quadratic_times,
}


def times_for(grid: str, steps: int) -> Float[Tensor, " times"]:
    """The times of a grid by its name in GRIDS: `steps` intervals from 0 to 1."""
    return lookup(GRIDS, grid, "grid")(steps)


def _require_count(name: str, value: object) -> None:
    require(
        isinstance(value, Integral) and int(value) >= 1,  # numpy's integers too
        f"{name} (={value}) must be a whole number, at least 1; use 1 or more",
    )


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    require(times.ndim == 1, f"times (of shape {tuple(times.shape)}) must be a row; use flatten()")
    # Numbers, once: a loop over times on a GPU would wait for each of them.
    grid = times.tolist()
    rising = all(a < b for a, b in zip(grid, grid[1:], strict=False))  # false for NaN
    require(
        len(grid) >= 2 and rising and grid[0] >= 0 and grid[-1] <= 1,
        f"times (={grid}) must rise from 0 or more to 1 or less; use uniform_times(steps)",
    )
    return list(zip(grid[:-1], grid[1:], strict=True))


def _start(velocity: Velocity, noise: Tensor, times: Tensor) -> Tensor:
    # A field may have noise of a law of its own, and knows other noise; a callable takes any.
    check = getattr(velocity, "require_noise", None)
    if check is not None and times.numel() and float(times[0]) == 0:
        check(noise)
    return _wide(noise)


def _wide(noise: Tensor) -> Tensor:
    require(
        noise.is_floating_point(),
        f"noise (of {noise.dtype}) must hold floating-point numbers; use noise.float()",
    )
    # bfloat16 has no number between 255/256 and 1.
    return noise.to(torch.promote_types(noise.dtype, torch.float32))


def _at(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    """The velocity with every image at time t, which is kept below 1 where x's dtype rounds it."""
    # A time is a float64 number: it may be below 1 and still round to 1 in the dtype of x.
    last = 1 - torch.finfo(x.dtype).eps / 2  # the largest number below 1
    v = velocity(x, x.new_full((len(x),), min(t, last)))
    _require_shape("velocity's answer", v, x)
    return v.to(x.dtype)  # a network under autocast may answer in half precision


def _normal(draw: Draw | None, step: int, x: Tensor) -> Tensor:
    if draw is None:
        raise ValueError(
            "draw (=None) must give the noise of each step; use "
            "draw=lambda step: torch.randn_like(noise)"
        )
    z = draw(step)
    _require_shape("draw's answer", z, x)
    return z.to(x.dtype)


def _require_shape(name: str, given: Tensor, x: Tensor) -> None:
    """Refuse what torch would broadcast: one noise for all images, one velocity for all points."""
    require(
        given.shape == x.shape,
        f"{name} (of shape {tuple(given.shape)}) must have the shape of noise "
        f"(={tuple(x.shape)}); use one value for each colour",
    )


# Without a graph: that of every call on the path would be kept.
@torch.no_grad()
def heun(
    velocity: Velocity,
    noise: Float[Tensor, "b n 3"],
    times: Float[Tensor, " times"],
    draw: Draw | None = None,
) -> Float[Tensor, "b n 3"]:
    """Heun's method for the flow's ODE (Heun 1900): order 2, two calls an interval, no noise drawn.

    The one to start with: what this library samples with where nothing else is asked for.

    An interval that ends at t = 1 takes the midpoint rule. Ending on one Euler step instead, as
    EDM does (Karras et al. 2022, algorithm 1), loses variance: 10 % of it in 16 uniform steps on
    a Gaussian of variance 0.03.

    Args:
        velocity: v(x, t); x in noise's dtype, float32 at least, and t in x's.
        noise: x at times[0]; standard normal at 0.
        times: rising from 0 or more to 1 or less.
        draw: not asked.

    Returns:
        x at times[-1], in noise's dtype.

    Raises:
        ValueError: times that do not rise in [0, 1], noise of integers, or a velocity of another
            shape than the noise.
    """
    x = _start(velocity, noise, times)
    for t, end in _intervals(times):
        if end == 1:  # where Heun's second call would be
            x = _midpoint_step(velocity, x, t, end)
            continue
        h = end - t
        first = _at(velocity, x, t)
        second = _at(velocity, x + h * first, end)  # at the end that one Euler step foresees
        x = x + h / 2 * (first + second)
    return x.to(noise.dtype)  # half precision rounds the answer, and nothing before it


def _midpoint_step(velocity: Velocity, x: Tensor, t: float, end: float) -> Tensor:
    # Asked at t and in the middle, never at the end.
    h = end - t
    middle = x + h / 2 * _at(velocity, x, t)
    return x + h * _at(velocity, middle, t + h / 2)


@torch.no_grad()
def midpoint(
    velocity: Velocity,
    noise: Float[Tensor, "b n 3"],
    times: Float[Tensor, " times"],
    draw: Draw | None = None,
) -> Float[Tensor, "b n 3"]:
    """The midpoint rule for the flow's ODE (Runge 1895): order 2, two calls an interval, no noise.

    Closer than Heun's on few steps where the law is near a Gaussian (on one it is of order 3): a
    variance of 0.03 is kept to 99.9 % in 16 uniform steps, where Heun's makes it 103 %.
    Arguments and refusals as of `heun`.
    """
    x = _start(velocity, noise, times)
    for t, end in _intervals(times):
        x = _midpoint_step(velocity, x, t, end)
    return x.to(noise.dtype)


@torch.no_grad()
def sde(
    velocity: Velocity,
    noise: Float[Tensor, "b n 3"],
    times: Float[Tensor, " times"],
    draw: Draw | None = None,
    *,
    temperature: float = 0.5,
    noiseless_steps: int = 5,
) -> Float[Tensor, "b n 3"]:
    """Langevin: dx = [v + (s^2 / 2) score] dt + s dW, the same law as the ODE at any temperature.

    On this path E[x_0 | x] = x - t v, hence score = -E[x_0 | x] / (1 - t) = (t v - x) / (1 - t)
    (Ma et al. 2024, SiT, section 2). The noise s(t) = temperature sqrt(2 (1 - t)) is annealed
    so that (s^2 / 2) score = temperature^2 (t v - x) stays finite. Steps are Heun's with the same
    noise in both calls: weak order 2 (Kloeden & Platen 1992, 15.1), two calls an interval.

    For a learned velocity and a budget of many steps: the score pulls back toward the law what
    errors of earlier steps have led off it, and an ODE carries on (Karras et al. 2022, section 4).
    Arguments and refusals as of `heun`, and:

    Args:
        draw: standard normal noise of each step; not asked at temperature 0, which is `heun`.
        temperature: in [0, 10]; with temperature^2 (end - t) above 2 a step is unstable.
        noiseless_steps: last steps that draw none and are `heun`'s, at least 1.
    """
    intervals = _intervals(times)
    require(0 <= temperature <= 10, f"temperature (={temperature}) must be in [0, 10]; use 0 to 1")
    _require_count("noiseless_steps", noiseless_steps)
    # Without temperature there is nothing but Heun's steps.
    # A noisy step asks for the velocity at its end, and hence cannot be the last, which ends at 1.
    noisy_steps = max(len(intervals) - noiseless_steps, 0) if temperature > 0 else 0

    def drift(x: Tensor, t: float) -> Tensor:
        v = _at(velocity, x, t)
        return v + temperature**2 * (t * v - x)  # (s^2 / 2) score, its 1 - t cancelled

    x = _start(velocity, noise, times)
    for step, (t, end) in enumerate(intervals[:noisy_steps]):
        h = end - t
        variance = temperature**2 * ((1 - t) ** 2 - (1 - end) ** 2)  # s^2 integrated over the step
        dw = variance**0.5 * _normal(draw, step, x)
        # The same noise in the foreseen end and in the step: that is what makes it of weak order 2.
        first = drift(x, t)
        second = drift(x + h * first + dw, end)
        x = x + h / 2 * (first + second) + dw
    return heun(velocity, x, times[noisy_steps:]).to(noise.dtype)  # times: one more than intervals


@torch.no_grad()
def ddim(
    velocity: Velocity,
    noise: Float[Tensor, "b n 3"],
    times: Float[Tensor, " times"],
    draw: Draw | None = None,
    *,
    eta: float = 0.0,
) -> Float[Tensor, "b n 3"]:
    """DDIM (Song, Meng & Ermon 2021, eq. 12) on this path: order 1, one call an interval.

    With x_1 and x_0 replaced by their means given x_t, x_s = s x_1 + sqrt((1 - s)^2 - sigma^2)
    x_0 + sigma z, so that the noise in x_s has exactly the path's (1 - s)^2. eta = 1 draws from
    q(x_s | x_t, x_1): sigma = eta (1 - s) sqrt(1 - (t (1 - s) / (s (1 - t)))^2), which is eq. 16
    for signal t and noise 1 - t in place of sqrt(alpha) and sqrt(1 - alpha). eta = 0 is Euler's
    method.

    For a budget of very few calls, and to compare with work on diffusion. Arguments and refusals
    as of `heun`, and:

    Args:
        draw: standard normal noise of each step but one that ends at 1; not asked at eta 0.
        eta: in [0, 1].
    """
    require(0 <= eta <= 1, f"eta (={eta}) must be in [0, 1]; use 0, 0.3 or 1")
    x = _start(velocity, noise, times)
    for step, (t, end) in enumerate(_intervals(times)):
        v = _at(velocity, x, t)
        # Signal to noise at t over that at `end`: below 1, and 0 at the start.
        kept = t * (1 - end) / (end * (1 - t))
        variance = (eta * (1 - end)) ** 2 * (1 - kept**2)  # 0 where a step ends at 1
        # The means of x_1 and of x_0 given x_t. What is drawn anew is taken off the old noise; with
        # eta up to 1 the root stays real.
        x = end * (x + (1 - t) * v) + ((1 - end) ** 2 - variance) ** 0.5 * (x - t * v)
        if variance > 0:  # else `draw` may be None
            x = x + variance**0.5 * _normal(draw, step, x)
    return x.to(noise.dtype)


@torch.no_grad()
def exponential(
    velocity: Velocity,
    noise: Float[Tensor, "b n 3"],
    times: Float[Tensor, " times"],
    draw: Draw | None = None,
) -> Float[Tensor, "b n 3"]:
    """Adams-Bashforth where the noise's own law stands still: order 2, one call an interval.

    With m the posterior mean, which the first call gives, y = (x_t - t m) / sqrt(t^2 + (1 - t)^2)
    does not move if the noise has the law of x_1 - m: one call gives a draw of that law around m,
    and more of them move y by what the law is besides (an exponential integrator, as DPM-Solver:
    Lu et al. 2022; in the angle of TrigFlow: Lu & Song 2024). For fields whose noise has the law
    of the residual, and a budget of few calls; on others it is a method of order 2 as good as any.

    Steps are taken in that angle, atan(t / (1 - t)), at the times of a grid from 0 to 1.
    Arguments and refusals as of `heun`.
    """
    intervals = _intervals(times)
    require(
        intervals[0][0] == 0 and intervals[-1][1] == 1,
        f"times (={times.tolist()}) must go from 0 to 1: the posterior mean is known at 0 alone; "
        "use uniform_times(steps)",
    )
    x = _start(velocity, noise, times)
    m = x + _at(velocity, x, 0.0)
    # At t = 0 y is x, and its slope, s v - s m - (2 t - 1) y of below, is 0 by the choice of m.
    y, before = x, torch.zeros_like(x)
    angles = [math.atan2(t, 1 - t) for t, _ in intervals]
    for i, (angle, end) in enumerate(zip(angles, [*angles[1:], math.pi / 2], strict=True)):
        h = end - angle
        slope = before if i == 0 else _turning(velocity, m, y, angle)
        # Adams and Bashforth's weights for a step `ratio` times as long as the one before.
        ratio = 0.0 if i == 0 else h / (angle - angles[i - 1])
        y = y + h * ((1 + ratio / 2) * slope - ratio / 2 * before)
        before = slope
    return (m + y).to(noise.dtype)


def _turning(velocity: Velocity, m: Tensor, y: Tensor, angle: float) -> Tensor:
    """dy / d angle, with tan(angle) = t / (1 - t): s (v - m) - (2 t - 1) y, since d angle / dt is
    1 / s^2 and ds / dt is (2 t - 1) / s."""
    t = math.sin(angle) / (math.sin(angle) + math.cos(angle))
    s = math.hypot(t, 1 - t)
    return s * (_at(velocity, t * m + s * y, t) - m) - (2 * t - 1) * y


@torch.no_grad()
def mean(
    velocity: Velocity,
    noise: Float[Tensor, "b n 3"],
    times: Float[Tensor, " times"] | None = None,
    draw: Draw | None = None,
) -> Float[Tensor, "b n 3"]:
    """The posterior mean in one call: x_0 + v(x_0, 0) = E[x_1]; neither times nor draw is asked.

    For the least squared error (PSNR), and as the quickest answer; it is smoother than any image.
    """
    x = _wide(noise)  # any will do
    return (x + _at(velocity, x, 0.0)).to(noise.dtype)


@dataclass(frozen=True)
class Solver:
    """A sampler as its callers see it: what it is called, costs and takes, and one way to call it.

    A run on a budget of calls: `solver(velocity, noise, times_for(grid, solver.steps_for(nfe)),
    draw, **settings)`.
    """

    name: str
    """Its key in SOLVERS, as a user types it."""
    title: str
    """What a table calls it."""
    function: Callable[..., Tensor]
    """The sampler itself."""
    calls_per_step: int
    """Calls of the velocity for each interval; for all of them if it takes no times."""
    draws_noise: bool = False
    """Whether it asks `draw`, at some of its settings at least."""
    takes_times: bool = True
    """False: it makes its calls once, whatever the times."""

    @property
    def settings(self) -> dict[str, float | int]:
        """The keyword settings that it takes, and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        # What stands before the star all samplers take; what follows it is one's own.
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def calls(self, steps: int) -> int:
        """Calls of the velocity (NFE) that `steps` intervals take."""
        _require_count("steps", steps)
        return self.calls_per_step * (steps if self.takes_times else 1)

    def steps_for(self, nfe: int) -> int:
        """The most intervals that take `nfe` calls at most; 1 if it takes no times."""
        _require_count("nfe", nfe)
        require(
            nfe >= self.calls_per_step,
            f"nfe (={nfe}) must be at least {self.calls_per_step}, the calls of one step of "
            f"{self.name}; use {self.calls_per_step}",
        )
        return nfe // self.calls_per_step if self.takes_times else 1

    def __call__(
        self,
        velocity: Velocity,
        noise: Float[Tensor, "b n 3"],
        times: Float[Tensor, " times"],
        draw: Draw | None = None,
        **settings: float | int,
    ) -> Float[Tensor, "b n 3"]:
        """Colours from noise, as the sampler's own function makes them.

        Raises:
            ValueError: a setting that it does not take, or what the function refuses.
        """
        valid = self.settings
        # By our words with the valid names, not by the function's TypeError.
        for name in settings:
            require(
                name in valid,
                f"{self.name} has no setting {name!r}; valid: {', '.join(valid) or 'none'}",
            )
        return self.function(velocity, noise, times, draw, **settings)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("mean", "posterior mean", mean, calls_per_step=1, takes_times=False),
        Solver("exponential", "exponential", exponential, calls_per_step=1),
        Solver("ddim", "DDIM", ddim, calls_per_step=1, draws_noise=True),
        Solver("sde", "Langevin", sde, calls_per_step=2, draws_noise=True),
        Solver("midpoint", "midpoint", midpoint, calls_per_step=2),
        Solver("heun", "Heun", heun, calls_per_step=2),
    )
}


class CountedVelocity:
    """A velocity that counts its calls: the NFE of a table is measured, not declared."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.calls = velocity, 0

    def require_noise(self, x: Float[Tensor, "b n 3"]) -> None:
        """What the velocity itself makes of the noise."""
        getattr(self.velocity, "require_noise", lambda x: None)(x)

    def __call__(self, x: Float[Tensor, "b n 3"], t: Float[Tensor, " b"]) -> Tensor:
        self.calls += 1
        return self.velocity(x, t)
