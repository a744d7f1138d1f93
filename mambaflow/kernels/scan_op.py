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


def empty_gradients(*inputs: Tensor | None) -> list[Tensor]:
    """Room for the gradients of the inputs that there are."""
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def keep_first(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Save what an operator kept and its inputs but `keep`, the last. Its first output alone has
    a gradient: nothing is made of zeros for the others."""
    ctx.save_for_backward(*output[1:], *inputs[:-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
