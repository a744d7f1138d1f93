"""The probability path from noise to data, and the loss of a velocity on it.

x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I) and x_1 the data (Liu et al. 2022; Lipman et al.
2023, the optimal-transport path with sigma_min = 0).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LAST_STRETCH = 0.1


def interpolate(
    x_0: Float[Tensor, "b n 3"], x_1: Float[Tensor, "b n 3"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b n 3"]:
    """The point of the path at each image's own time."""
    return torch.lerp(x_0, x_1, t[:, None, None])


def target_velocity(
    x_0: Float[Tensor, "b n 3"], x_1: Float[Tensor, "b n 3"]
) -> Float[Tensor, "b n 3"]:
    """What the velocity field is the conditional mean of: dx_t / dt = x_1 - x_0."""
    return x_1 - x_0


def sample_times(
    u: Float[Tensor, " b"], share_at_zero: float, law: str = "uniform"
) -> Float[Tensor, " b"]:
    """Uniform draws to times: a share exactly at t = 0, the rest by `law`.

    The share at t = 0 trains the posterior mean x_0 + v(x_0, 0), which other times never ask for.
    Laws: "uniform"; "logit_normal", the sigmoid of N(0, 1) (Esser et al. 2024, section 3.1).
    """
    if law not in LAWS:
        raise ValueError(f"unknown time law {law!r}; valid: {', '.join(LAWS)}")
    if not 0 <= share_at_zero <= 1:
        raise ValueError(f"share_at_zero (={share_at_zero}) must be in [0, 1]; use 0.1")
    if share_at_zero == 1:
        return torch.zeros_like(u)
    rest = (u - share_at_zero) / (1 - share_at_zero)
    return torch.where(rest < 0, 0.0, LAWS[law](rest.clamp(min=0)))


LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "logit_normal": lambda u: torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid(),
}

# Weight of |velocity error|^2 at each time. "data": with E[x_1 | x_t] = x_t + (1 - t) v, the error
# of the data is (1 - t) times that of the velocity; it is weighted by 1 / max(1 - t, 0.1).
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "velocity": torch.ones_like,
    "data": lambda t: (1 - t).square() / (1 - t).clamp(min=LAST_STRETCH),
}


def loss(
    velocity: Float[Tensor, "b n 3"],
    x_0: Float[Tensor, "b n 3"],
    x_1: Float[Tensor, "b n 3"],
    t: Float[Tensor, " b"],
    weighting: str = "velocity",
) -> Float[Tensor, ""]:
    """Mean squared error of the velocity, weighted by time."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; valid: {', '.join(WEIGHTINGS)}")
    error = (velocity - target_velocity(x_0, x_1)).square().mean((1, 2))
    return (WEIGHTINGS[weighting](t) * error).mean()
