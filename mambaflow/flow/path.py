"""The probability path from noise to data, and the loss of a velocity on it.

x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I) and x_1 the data (Liu et al. 2022; Lipman et al.
2023, the optimal-transport path with sigma_min = 0).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mambaflow.checks import lookup, require

LAST_STRETCH = 0.1  # from 1 - t = 0.1 on to the data 1 / (1 - t) counts as 10


def interpolate(
    x_0: Float[Tensor, "b n 3"], x_1: Float[Tensor, "b n 3"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b n 3"]:
    """The point of the path at each image's own time: x_t = (1 - t) x_0 + t x_1.

    Args:
        x_0: noise.
        x_1: colours of the data.
        t: times in [0, 1].

    Raises:
        ValueError: shapes differ, or hold no floating-point numbers.
    """
    _require_alike(x_0=x_0, x_1=x_1)
    _require_time_each(t, x_0)
    return torch.lerp(x_0, x_1, t[:, None, None])  # exact at both ends


def target_velocity(
    x_0: Float[Tensor, "b n 3"], x_1: Float[Tensor, "b n 3"]
) -> Float[Tensor, "b n 3"]:
    """What the velocity field is the conditional mean of: dx_t / dt = x_1 - x_0.

    Raises:
        ValueError: shapes differ, or hold no floating-point numbers.
    """
    _require_alike(x_0=x_0, x_1=x_1)
    return x_1 - x_0


def _require_alike(**tensors: Tensor) -> None:
    """Floating-point tensors of one shape: torch would broadcast, and bytes would wrap around."""
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        require(
            tensor.is_floating_point(),
            f"{name} (of {tensor.dtype}) must hold floating-point numbers; use {name}.float()",
        )
        require(
            tensor.shape == reference.shape,
            f"{name} (of shape {tuple(tensor.shape)}) must have the shape of {first} "
            f"(={tuple(reference.shape)}); use {name}.expand_as({first}) if that is meant",
        )


def _require_time_each(t: Tensor, x: Tensor) -> None:
    require(
        t.shape == x.shape[:1] and t.is_floating_point(),
        f"t (of shape {tuple(t.shape)}, {t.dtype}) must hold one time for each of {len(x)} images; "
        f"use torch.full(({len(x)},), t)",
    )


def sample_times(
    u: Float[Tensor, " b"], share_at_zero: float, law: str = "uniform"
) -> Float[Tensor, " b"]:
    """Uniform draws to times: a share exactly at t = 0, the rest by `law`.

    The share at t = 0 trains the posterior mean x_0 + v(x_0, 0), which other times never ask for.

    Args:
        u: uniform on [0, 1), float32 or float64.
        share_at_zero: in [0, 1].
        law: "uniform"; "logit_normal", the sigmoid of N(0, 1) (Esser et al. 2024, section 3.1).

    Raises:
        ValueError: an unknown law, a share outside [0, 1], or u of less than float32.
    """
    transform = lookup(LAWS, law, "time law")
    require(0 <= share_at_zero <= 1, f"share_at_zero (={share_at_zero}) must be in [0, 1]; use 0.1")
    # Half precision would round the last times to t = 1.
    require(
        u.dtype in (torch.float32, torch.float64),
        f"u (of {u.dtype}) must be float32 or float64; use u.float()",
    )
    if share_at_zero == 1:  # nothing is left for the law, nor to divide by
        return torch.zeros_like(u)
    # One draw serves twice: below the share it says "zero"; above, stretched, it is uniform.
    rest = (u - share_at_zero) / (1 - share_at_zero)
    # The law computes the draws that are not taken as well: none may lie outside [0, 1].
    return torch.where(rest < 0, 0.0, transform(rest.clamp(min=0)))


LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    # The quantile is infinite at 0 and 1; a millionth from them times are 0.009 and 0.991.
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
    """Mean squared error of the velocity, weighted by time (Lipman et al. 2023, eq. 9).

    Args:
        velocity: what the network answers at (interpolate(x_0, x_1, t), t).
        weighting: "velocity", all times alike; "data", see WEIGHTINGS.

    Raises:
        ValueError: an unknown weighting, shapes that differ, no floating-point numbers, or none
            at all, of which the mean is NaN.
    """
    weight = lookup(WEIGHTINGS, weighting, "weighting")
    _require_alike(x_0=x_0, x_1=x_1, velocity=velocity)
    _require_time_each(t, x_0)
    require(x_0.numel() > 0, f"x_0 (of shape {tuple(x_0.shape)}) must hold a colour at least")
    error = (velocity - target_velocity(x_0, x_1)).square().mean((1, 2))  # (b,), one time each
    return (weight(t) * error).mean()
