"""Matrix products with weights, by the fastest library that torch brings for this processor.

On CPU torch takes MKL's, which keeps AVX-512 from AMD's processors; oneDNN's do not, and are
faster there by a fifth (Zen 4) to twice (Zen 5). Both are asked for products in float32 without
packed layouts, so that weights stay as they are. An operator of our own stands around oneDNN's:
torch.compile would refuse that one for weights that are learned. Set MAMBAFLOW_ONEDNN=0 to do
without.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.kernels.compiler import constant
from mambaflow.kernels.transforms import is_transformed
from mambaflow.variables import stated

# Multiplications from which oneDNN's longer way to the kernel is paid for.
MIN_MULTIPLICATIONS = 2**23


def onednn_is_faster(processor: str) -> bool:
    """Whether oneDNN's products are faster than MKL's on a machine with this /proc/cpuinfo."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    here = platform.machine() == "x86_64" and both
    return here and "AuthenticAMD" in processor and "avx512f" in processor


@cache
def _onednn_is_faster_here() -> bool:
    info = Path("/proc/cpuinfo")
    wanted = stated("MAMBAFLOW_ONEDNN") != "0"
    return wanted and onednn_is_faster(info.read_text() if info.exists() else "")


@constant  # torch.compile cannot look into a cached function
def _onednn() -> bool:
    return _onednn_is_faster_here() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def large(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product of these is one for oneDNN."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    plain = all(v.is_cpu and v.dtype == torch.float32 for v in tensors)
    # What does not fit is left to torch, whose words for it are the clearer ones.
    fits = x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    enough = plain and fits and x.numel() * len(weight) >= MIN_MULTIPLICATIONS
    return enough and _onednn() and not is_transformed()


def linear_forward(
    x: Float[Tensor, "rows k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None
) -> Float[Tensor, "rows n"]:
    """x weight' + bias, without a gradient."""
    if not large(x, weight, bias):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # its strides are not looked at
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weight_grad(dy: Float[Tensor, "rows n"], x: Float[Tensor, "rows k"]) -> Float[Tensor, "n k"]:
    """dy' x, as the gradient of a weight is, without a gradient.

    oneDNN is fastest, by up to 1.8, where the first of its factors is the narrower.
    """
    if _is_transposed(dy, x):
        return linear_forward(x.t(), dy.t(), None).t()
    return linear_forward(dy.t(), x.t(), None)


def _is_transposed(dy: Tensor, x: Tensor) -> Any:  # a bool, or a symbol of one while compiling
    return dy.shape[1] > x.shape[1]


_linear = torch.library.custom_op(
    "mambaflow::linear", linear_forward, mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)  # fmt: skip
_weight_grad = torch.library.custom_op(
    "mambaflow::weight_grad", weight_grad, mutates_args=(), schema="(Tensor dy, Tensor x) -> Tensor"
)
_linear.register_fake(lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))


@_weight_grad.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    n, k = dy.shape[1], x.shape[1]
    # Strides too must be what the operator gives: compiled graphs read by them.
    return x.new_empty(k, n).t() if _is_transposed(dy, x) else x.new_empty(n, k)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Each factor, if the other one wants a gradient; for both operators."""
    first, second = ctx.needs_input_grad[:2]
    ctx.save_for_backward(inputs[0] if second else None, inputs[1] if first else None)


# The gradients of each operator are products by these operators again: they have any order.
def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    if is_transformed():  # our operators would lose what dy carries
        dx, dweight = None if weight is None else dy @ weight, None if x is None else dy.t() @ x
    else:
        dx = None if weight is None else _linear(dy, weight.t(), None)
        dweight = None if x is None else _weight_grad(dy, x)
    return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dy, x = ctx.saved_tensors
    product = F.linear if is_transformed() else _linear
    return (
        None if x is None else product(x, grad, None),
        None if dy is None else product(dy, grad.t(), None),
    )


_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_for_backward)


def linear(
    x: Float[Tensor, "*rows k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*rows n"]:
    """x weight' + bias, and derivatives of any order and mode."""
    # Under autocast torch's own product is in half precision; ours would not be.
    if large(x, weight, bias) and not torch.is_autocast_enabled("cpu"):
        return _linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch.nn.Linear, by `linear`."""

    def forward(self, input: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows n"]:
        return linear(input, self.weight, self.bias)
