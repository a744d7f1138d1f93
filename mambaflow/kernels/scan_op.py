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
    """The operator mambaflow::<name> of the inputs of `models.selective_scan` and `save`.

    `save` says that a backward pass may come. It is an argument, since inside the operator autograd
    is off and no input says any longer that it wants a gradient.

    Args:
        forward: the output, and what is saved for the backward pass, of the inputs and `save`.
        backward: of the output's gradient, what was saved, and the inputs, the gradients of those
            that there are.
        allocate: empty tensors for what `forward` gives, of u, A and `save`.
    """
    # What is saved must be an output: an operator may leave nothing else behind. Backward is an
    # operator too, so that compiled graphs of gradients call it whole; it has no gradient itself,
    # and torch refuses a second derivative.
    scan = torch.library.custom_op(
        f"mambaflow::{name}", forward, mutates_args=(),
        schema=f"({INPUTS}, bool save) -> (Tensor, Tensor)",
    )  # fmt: skip
    scan_backward = torch.library.custom_op(
        f"mambaflow::{name}_backward", backward, mutates_args=(),
        schema=f"(Tensor dy, Tensor saved, {INPUTS}) -> Tensor[]",
    )  # fmt: skip
    scan.register_fake(lambda u, dt, A, B, C, D, z, save: allocate(u, A, save))
    scan_backward.register_fake(lambda dy, saved, *inputs: empty_gradients(*inputs))

    def differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        refuse_transformed(f"the gradient of {name}", CURE, dy, *ctx.saved_tensors)
        grads = scan_backward(dy, *ctx.saved_tensors)
        return *grads, *[None] * (8 - len(grads))  # for z, where there is none, and for `save`

    scan.register_autograd(differentiate, setup_context=save_for_backward)
    return scan


def empty_gradients(*inputs: Tensor | None) -> list[Tensor]:
    """Empty tensors for the gradients of the inputs that there are, dense whatever these are."""
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Save what an operator saved, and its inputs but `save`, the last. Its first output alone has
    a gradient: nothing is made of zeros for the others."""
    ctx.save_for_backward(*output[1:], *inputs[:-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
