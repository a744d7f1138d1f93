"""The scan as an operator of torch, whichever kernel computes it: differentiable, and whole to
torch.compile, which does not look into it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambaflow.kernels.transforms import refuse_transformed

CURE = (
    "use selective_scan of backend 'auto' or 'chunked' inside the transform, or set "
    "MAMBAFLOW_NATIVE=0 on CPU"
)
KINDS = (torch.float32, torch.bfloat16, torch.float16)  # read by the kernels, float32 inside
INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z"


def scan_operator(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., list[Tensor]],
    allocate: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]],
) -> Any:
    """The operator mambaflow::<name> of the inputs of `models.selective_scan` and `keep`.

    Args:
        forward: the output, and what is kept for the backward pass, of the inputs and `keep`.
        backward: of the output's gradient, what was kept, and the inputs, the gradients of those
            that there are.
        allocate: room for what `forward` gives, of u, A and `keep`.
    """
    scan = torch.library.custom_op(
        f"mambaflow::{name}", forward, mutates_args=(),
        schema=f"({INPUTS}, bool keep) -> (Tensor, Tensor)",
    )  # fmt: skip
    gradients = torch.library.custom_op(
        f"mambaflow::{name}_backward", backward, mutates_args=(),
        schema=f"(Tensor dy, Tensor kept, {INPUTS}) -> Tensor[]",
    )  # fmt: skip
    scan.register_fake(lambda u, dt, A, B, C, D, z, keep: allocate(u, A, keep))
    gradients.register_fake(lambda dy, kept, *inputs: empty_gradients(*inputs))

    def through(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is not None:
            refuse_transformed(f"the gradient of {name}", CURE, dy, *ctx.saved_tensors)
        found = [] if dy is None else gradients(dy, *ctx.saved_tensors)
        return *found, *[None] * (8 - len(found))  # for z, where there is none, and for `keep`

    scan.register_autograd(through, setup_context=keep_first)
    return scan


def refuse_kinds(device: torch.device, cure: str, **tensors: Tensor | None) -> None:
    """Refuse tensors whose numbers a kernel would misread; `cure` is for double precision, which
    other backends take.

    Raises:
        ValueError: one elsewhere than on `device`, in double precision, or of whole numbers.
    """
    for name, x in tensors.items():
        if x is not None and (x.dtype not in KINDS or x.device != device):
            double = x.dtype == torch.float64 and x.device == device
            raise ValueError(
                f"{name} (={x.dtype} on {x.device}) must be float32, bfloat16 or float16 on "
                f"{device} for this kernel; {cure if double else 'convert it'}"
            )


def refuse_shapes(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuse shapes that disagree, before a kernel reads beyond them.

    Raises:
        ValueError: one has another shape than is asked of it.
    """
    for name, (x, shape) in tensors.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} (of shape {tuple(x.shape)}) must have shape {shape}")


def refuse_scan_shapes(u, dt, A, B, C, D, z) -> None:
    """Refuse inputs of a scan whose shapes disagree.

    Raises:
        ValueError: u is not (b, n, d), A not (d, s), or another does not fit these.
    """
    there = u.dim() == 3 and A.dim() == 2
    if there and _agree(u.shape, A.shape, u, dt, B, C, D, z):
        return
    if not there:
        shapes = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"u and A (of shapes {shapes}) must have shapes (b, n, d) and (d, s)")
    (b, n, d), s = u.shape, A.shape[1]
    tokens, states = (b, n, d), (b, n, s)
    refuse_shapes(
        dt=(dt, tokens), A=(A, (d, s)), B=(B, states), C=(C, states), D=(D, (d,)), z=(z, tokens)
    )


def _agree(tokens: torch.Size, rates: torch.Size, u, dt, B, C, D, z) -> bool:
    """Whether the other shapes are those that u and A ask for: asked at every call, so in short."""
    (b, n, d), s = tokens, rates[1]
    fits = rates[0] == d and dt.shape == tokens and B.shape == (b, n, s) and C.shape == (b, n, s)
    return fits and D.shape == (d,) and (z is None or z.shape == tokens)


def empty_gradients(*inputs: Tensor | None) -> list[Tensor]:
    """Room for the gradients of the inputs that there are."""
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def keep_first(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Save what an operator kept and its inputs but `keep`, the last. Its first output alone has
    a gradient: nothing is made of zeros for the others."""
    ctx.save_for_backward(*output[1:], *inputs[:-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
