"""Inputs of the selective scan, and how its results are compared, for kernels and models.

Gradients of the float32 kernel are compared with those of the float64 reference, which gradcheck
proves. gradcheck itself is of no use in float32: a difference quotient over eps has an error of
1e-7 / eps from rounding and eps^2 from curvature, at best 1e-5 of the largest output, and small
gradients drown in it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaflow.kernels.build import library
from mambaflow.models.selective_scan import selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "z")
needs_native = pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")
FAST = ["chunked", pytest.param("native", marks=needs_native)]


def inputs(b: int, n: int, d: int, s: int, *, gate: bool = True, seed: int = 0) -> list[Tensor]:
    """Float64 tensors of a scan in the range of a network's."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, n, d), (b, n, d), (d, s), (b, n, s), (b, n, s), (d,), (b, n, d)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[1] -= 1
    tensors[2] = -tensors[2].exp()
    return tensors[: 7 if gate else 6]


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype, copy=True).requires_grad_() for x in tensors]


def with_gradients(work, tensors: list[Tensor], turn=lambda x: x) -> list[Tensor]:
    """The output and the gradient of every input, along a seeded direction."""
    y = work(*tensors)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, tensors, turn(dy).to(y.dtype))]


def scan_results(tensors: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    work = lambda *x: selective_scan(*x, backend=backend)  # noqa: E731
    return with_gradients(work, leaves(tensors, dtype))


def assert_near(found, right, most: float, names=NAMES, sizes=None) -> None:
    """Every number within `most` of its size in `sizes`, what its terms add up to; without sizes,
    of the largest number of its tensor."""
    for name, x, y, size in zip(("y", *names), found, right, sizes or right, strict=False):
        assert x.shape == y.shape, name
        size = size if sizes else size.abs().max()
        error = (x.double() - y.double()).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)
        assert (error <= most).all(), f"{name}: off by {error.max()}"


def without_cancellation(tensors: list[Tensor]) -> list[Tensor]:
    """How large the output and the gradients were if no terms cancelled, in float64: what rounding
    errors are fractions of."""
    loud = [x if i in (1, 2) else x.abs() for i, x in enumerate(tensors)]
    return with_gradients(_loud_scan, leaves(loud, torch.float64), torch.abs)


def _loud_scan(u, dt, A, B, C, D, z=None) -> Tensor:
    """The scan of numbers without a sign, in which a decay's slope along dt, A times it and below
    zero, has lost its sign too."""
    step = F.softplus(dt)
    moved = (step - step.detach())[..., None] * -A.detach() + step.detach()[..., None] * (
        A - A.detach()
    )
    decay = torch.exp(step[..., None] * A).detach() * (1 + moved)
    drive = (step * u)[..., None] * B[:, :, None]
    h, outputs = torch.zeros_like(decay[:, 0]), []
    for i in range(u.shape[1]):
        h = decay[:, i] * h + drive[:, i]
        outputs.append((h * C[:, i, None]).sum(-1))
    y = torch.stack(outputs, 1) + D * u
    return y if z is None else y * F.silu(z)


def strided(x: Tensor, how: int) -> Tensor:
    """The same numbers laid out otherwise: dense, within wider rows, turned, or every other."""
    if how == 1:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    if how == 2:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else x
    return torch.repeat_interleave(x, 2, -1)[..., ::2] if how == 3 else x


def unchecked(work, *args, **kwargs):
    """Call without the tests' check of shapes, as users do."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        return work(*args, **kwargs)
    finally:
        config.update("jaxtyping_disable", False)
