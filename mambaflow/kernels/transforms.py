"""Derivatives and batches by transforms of a function, for which operators of our own have no rule.

forward_ad and torch.func (jvp, jacfwd, vmap, grad, hessian, ...) ask each operator for a rule. One
made by torch.library.custom_op takes none but `register_autograd`'s: it would lose tangents without
a word. While such a transform runs, is_supported() of every kernel is false, so that products, scan
and attention are composed of torch's own operations, which have all rules; a kernel that is called
by its name refuses what carries a derivative.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mambaflow.kernels.compiler import constant

_functorch = torch._C._functorch
_level = _functorch.maybe_current_level  # looked up once: this is asked at every call of a kernel


def is_transformed() -> bool:
    """Whether this runs inside a transform of torch.func or a forward_ad.dual_level().

    The level is read as it stands, not by a function: torch.compile guards what it reads so, and
    compiles anew for another level.
    """
    return forward_ad._current_level >= 0 or _in_torch_func()


@constant  # torch.compile guards the stack of transforms by itself
def _in_torch_func() -> bool:
    return _level() is not None


def refuse_transformed(kernel: str, cure: str, *tensors: Tensor | None) -> None:
    """Refuse tensors whose derivatives a kernel would lose.

    Batches (torch.func.vmap) alone are let through: torch calls an operator without a rule once
    for each, or refuses.

    Raises:
        NotImplementedError: one carries a tangent, or is differentiated by torch.func.
    """
    if is_transformed() and any(x is not None and _carries_derivative(x) for x in tensors):
        raise NotImplementedError(
            f"{kernel} has no rule for forward-mode derivatives (torch.func.jvp, forward_ad), nor "
            f"for torch.func.grad; {cure}"
        )


def _carries_derivative(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):  # one wrapper for each transform around it
        if _functorch.is_gradtrackingtensor(x):  # of grad, vjp and jvp alike
            return True
        x = _functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None
