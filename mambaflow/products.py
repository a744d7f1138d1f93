"""Matrix products with weights, by the fastest library that torch brings for this processor.

On CPU torch takes MKL's, which keeps AVX-512 from AMD's processors; oneDNN's do not, and are
faster there by a fifth (Zen 4) to twice (Zen 5). What torch.compile's Inductor calls is called
here: oneDNN's product, without its packed layouts.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST = 2**23  # multiplications from which oneDNN's longer way to the kernel is paid for


def suits(processor: str) -> bool:
    """Whether oneDNN's products are faster than MKL's on a machine with this /proc/cpuinfo."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    here = platform.machine() == "x86_64" and both
    return here and "AuthenticAMD" in processor and "avx512f" in processor


@cache
def _suits_here() -> bool:
    info = Path("/proc/cpuinfo")
    return suits(info.read_text() if info.exists() else "")


@torch.compiler.assume_constant_result
def _onednn() -> bool:
    return _suits_here() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def large(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of `x` with this weight is one for oneDNN."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return plain and x.numel() * weight.shape[0] >= LEAST and _onednn()


def product(
    x: Float[Tensor, "*rows k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None
) -> Float[Tensor, "*rows n"]:
    """x weight' + bias, without a gradient."""
    if large(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def across(dy: Float[Tensor, "rows n"], x: Float[Tensor, "rows k"]) -> Float[Tensor, "n k"]:
    """dy' x, as the gradient of a weight is, without a gradient.

    oneDNN is fastest, by up to 1.8, where the first of its factors is the narrower.
    """
    if not large(x, dy.t()):
        return dy.t() @ x
    if dy.shape[1] <= x.shape[1]:
        return product(dy.t(), x.t(), None)
    return product(x.t(), dy.t(), None).t()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        through, of_weight, of_bias = ctx.needs_input_grad
        dy = dy.flatten(0, -2)
        dx = product(dy, weight.t(), None).view_as(x) if through else None
        dweight = across(dy, x.flatten(0, -2)) if of_weight else None
        return dx, dweight, dy.sum(0) if of_bias else None


def linear(
    x: Float[Tensor, "*rows k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*rows n"]:
    """x weight' + bias, as torch.nn.functional.linear."""
    if large(x, weight) and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch.nn.Linear, by `linear`."""

    def forward(self, input: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows n"]:
        return linear(input, self.weight, self.bias)
