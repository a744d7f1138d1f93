"""The compiled scan and convolution as operators of torch: differentiable, and whole to
torch.compile, which looks into neither.

Each has three layers: a function that checks and prepares tensors, an operator with its gradient,
and the call of the C function, to which tensors are addresses and strides.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.kernels.build import (
    CHUNK,
    LANES,
    MAX_STATES,
    MAX_TAPS,
    dense,
    int64_array,
    is_built,
    kernels,
    needs_grad,
    pointer,
)
from mambaflow.kernels.checks import (
    KINDS,
    refuse_conv_shapes,
    refuse_kinds,
    refuse_scan_shapes,
    refuse_shapes,
    refuse_size,
)
from mambaflow.kernels.linear import linear_forward, weight_grad
from mambaflow.kernels.scan_op import CURE, empty_gradients, save_for_backward, scan_operator
from mambaflow.kernels.transforms import is_transformed, refuse_transformed

CPU = torch.device("cpu")
CHOOSE_CONV = "use models.mamba.causal_conv, which chooses"
CHOOSE_BLOCK = "use models.mamba.Mamba, in one precision"
INSIDE = "inside the transform, or set MAMBAFLOW_NATIVE=0"
CURE_CONV = f"use models.mamba.causal_conv {INSIDE}"
CURE_BLOCK = f"use models.mamba.Mamba {INSIDE}"
GROUPS = 16  # images x groups of channels in the backward pass: enough to share among threads


def is_supported(x: Tensor, *others: Tensor | None, states: int = 1, taps: int = 1) -> bool:
    """Whether there are compiled kernels for all these: on CPU, not double, within their sizes, not
    in a transform."""
    fits = 1 <= states <= MAX_STATES and 1 <= taps <= MAX_TAPS
    return fits and _can_read(x, *others) and is_built() and not is_transformed()


def _can_read(*tensors: Tensor | None) -> bool:
    """Whether all are of KINDS on CPU; is_cpu takes a sixth of the time of device.type."""
    return all(x is None or (x.is_cpu and x.dtype in KINDS) for x in tensors)


def scan(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b n d"] | None = None,
) -> Float[Tensor, "b n d"]:
    """The gated selective scan in float32, from half precisions too; see `models.selective_scan`.

    Raises:
        ValueError: over 64 states or none, double precision, another device, shapes that disagree:
            the kernel sees addresses.
        NotImplementedError: derivatives by forward_ad or torch.func.
    """
    refuse_scan_shapes(u, dt, A, B, C, D, z)
    refuse_size("states of A", A.shape[1], MAX_STATES, "use backend='chunked'")
    if not _can_read(u, dt, A, B, C, D, z):
        refuse_kinds(CPU, "use backend='auto'", u=u, dt=dt, A=A, B=B, C=C, D=D, z=z)
    refuse_transformed("the native scan", CURE, u, dt, A, B, C, D, z)
    # Conversions stand outside the operator: autograd takes gradients back through them.
    inputs = [None if x is None else dense(x) for x in (u, dt, A, B, C, D, z)]
    return _scan(*inputs, needs_grad(*inputs))[0].to(u.dtype)


def conv(
    x: Float[Tensor, "b n d"], weight: Float[Tensor, "d 1 w"], bias: Float[Tensor, " d"]
) -> Float[Tensor, "b n d"]:
    """silu of the causal convolution in float32; see `models.mamba.causal_conv`.

    Raises:
        ValueError: as `scan`; more than 8 taps or none.
        NotImplementedError: as `scan`.
    """
    refuse_conv_shapes(x, weight, bias)
    refuse_size("taps of weight", weight.shape[2], MAX_TAPS, CHOOSE_CONV)
    if not _can_read(x, weight, bias):
        refuse_kinds(CPU, CHOOSE_CONV, x=x, weight=weight, bias=bias)
    refuse_transformed("the native convolution", CURE_CONV, x, weight, bias)
    by_tap = weight.squeeze(1).t().float().contiguous()  # (taps, d): a tap of many channels at once
    return _conv(dense(x), by_tap, bias.float().contiguous()).to(x.dtype)


def mamba_inner(
    xz: Float[Tensor, "b n dd"],
    conv: nn.Conv1d,
    to_ranks: nn.Linear,
    to_dt: nn.Linear,
    A: Float[Tensor, "d s"],
    D: Float[Tensor, " d"],
) -> Float[Tensor, "b n d"]:
    """All of a Mamba block between its outer projections: convolution, projections, scan.

    What `models.mamba.Mamba` computes with `causal_conv` and `selective_scan`; xz is u before the
    convolution, then the gate, side by side. In float32, from half precisions too. It is one
    operator, so that the gradients of u and of the gate are written side by side as well.

    Raises:
        ValueError: as `scan`.
        NotImplementedError: as `scan`.
    """
    weights: tuple[Any, ...] = (
        conv.weight, conv.bias, to_ranks.weight, to_dt.weight, to_dt.bias, A, D
    )  # fmt: skip
    _refuse_block(xz, *weights)
    refuse_transformed("the native Mamba block", CURE_BLOCK, xz, *weights)
    by_tap = conv.weight.squeeze(1).t()
    inputs = dense(xz), *(x.float().contiguous() for x in (by_tap, *weights[1:]))
    return _inner(*inputs, needs_grad(*inputs))[0].to(xz.dtype)


def _refuse_block(xz, weight, bias, to_ranks, to_dt, dt_bias, A, D) -> None:
    (d, s), rank, taps = A.shape, to_dt.shape[1], weight.shape[2]
    refuse_size("states of A", s, MAX_STATES, CHOOSE_BLOCK)
    refuse_size("taps of weight", taps, MAX_TAPS, CHOOSE_BLOCK)
    names = ("xz", "weight", "bias", "to_ranks", "to_dt", "dt_bias", "D")
    tensors = (xz, weight, bias, to_ranks, to_dt, dt_bias, D)
    shapes = (
        (*xz.shape[:2], 2 * d), (d, 1, taps), (d,), (rank + 2 * s, d), (d, rank), (d,), (d,)
    )  # fmt: skip
    if not _can_read(*tensors, A):
        refuse_kinds(CPU, CHOOSE_BLOCK, A=A, **dict(zip(names, tensors, strict=True)))
    for name, x, shape in zip(names, tensors, shapes, strict=True):
        if x.shape != shape:
            refuse_shapes(**{name: (x, shape)})


def _strides(*rows: Tensor | None) -> list[int]:
    """(batch, row) strides of each, as the C functions read them; the last one is 1."""
    return [s for x in rows for s in ((0, 0) if x is None else x.stride()[:2])]


def _allocate(u: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for the output and, where `save`, for the states at the start of every chunk,
    in blocks of LANES channels: a vector's lanes lie side by side."""
    (b, n, d), s = u.shape, A.shape[1]
    saved = (b, -(-n // CHUNK), -(-d // LANES), s, LANES) if save else (0,)  # rounded up
    return u.new_empty(b, n, d), u.new_empty(saved)


def _scan_forward(u, dt, A, B, C, D, z, save: bool) -> tuple[Tensor, Tensor]:
    """The output, and what is saved of the states."""
    y, saved = _allocate(u, A, save)
    _scan_into(y, u, dt, A, B, C, D, z, saved if save else None)
    return y, saved


def _scan_into(y, u, dt, A, B, C, D, z, saved: Tensor | None) -> None:
    """The output to `y`, which may be `u`: each chunk of it is read before it is written."""
    (b, n, d), s = u.shape, A.shape[1]
    # Named, not only pointed to: a copy without a name would be freed before the kernel reads it.
    A, D = A.contiguous(), D.contiguous()
    shape = int64_array([b, n, d, s, *_strides(u, dt, B, C, z)])
    pointers = [pointer(x) for x in (u, dt, A, B, C, D, z, y, saved)]
    kernels().mambaflow_scan_forward(shape, *pointers, torch.get_num_threads())


def _scan_backward(u, dt, A, B, C, D, z, saved, dy, dz) -> tuple[Tensor, ...]:
    """The gradients of all inputs but z, whose goes into the rows of `dz`."""
    (b, n, d), s = u.shape, A.shape[1]
    dy = dy.contiguous()
    # By shape alone, not by the number of threads: so is the order in which dB and dC are summed.
    groups = max(1, min(GROUPS // max(b, 1), -(-d // LANES)))
    du, ddt = u.new_empty(b, n, d), u.new_empty(b, n, d)
    # Images are shared out among threads: each writes sums of its own, which torch adds up.
    dA, dD = u.new_empty(b, d, s), u.new_empty(b, d)
    dB, dC = u.new_empty(groups, b, n, s), u.new_empty(groups, b, n, s)
    shape = int64_array([b, n, d, s, *_strides(u, dt, B, C, z, dz)])
    pointers = [pointer(x) for x in (u, dt, A, B, C, D, z, dy, saved, du, ddt, dz, dA, dD, dB, dC)]
    kernels().mambaflow_scan_backward(
        shape, *pointers, ctypes.c_int64(groups), torch.get_num_threads()
    )
    return du, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0)


def _conv_forward(x, weight, bias) -> Tensor:
    """The convolution by a weight of (taps, d)."""
    (b, n, d), taps = x.shape, weight.shape[0]
    y = x.new_empty(b, n, d)
    pointers = [pointer(v) for v in (x, weight, bias, y)]
    shape = int64_array([b, n, d, taps, *_strides(x)])
    kernels().mambaflow_conv_forward(shape, *pointers, torch.get_num_threads())
    return y


def _conv_backward(x, weight, bias, dy, dx) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias; that of x goes into the rows of `dx`."""
    (b, n, d), taps = x.shape, weight.shape[0]
    dy = dy.contiguous()
    dweight, dbias = x.new_empty(b, taps, d), x.new_empty(b, d)
    pointers = [pointer(v) for v in (x, weight, bias, dy, dx, dweight, dbias)]
    shape = int64_array([b, n, d, taps, *_strides(x, dx)])
    kernels().mambaflow_conv_backward(shape, *pointers, torch.get_num_threads())
    return dweight.sum(0), dbias.sum(0)


def _scan_gradients(dy, saved, u, dt, A, B, C, D, z) -> list[Tensor]:
    dz = None if z is None else u.new_empty(u.shape)
    grads = _scan_backward(u, dt, A.contiguous(), B, C, D.contiguous(), z, saved, dy, dz)
    return [*grads] if dz is None else [*grads, dz]


# From here on: the operators. What register_fake is given makes outputs of the right shape and
# strides without numbers, which is how torch.compile runs an operator.
_scan = scan_operator("scan", _scan_forward, _scan_gradients, _allocate)


def _conv_gradients(dy, x, weight, bias) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    return dx, *_conv_backward(x, weight, bias, dy, dx)


CONV = "Tensor x, Tensor weight, Tensor bias"
_conv = torch.library.custom_op(
    "mambaflow::conv", _conv_forward, mutates_args=(), schema=f"({CONV}) -> Tensor"
)
_conv_backward_op = torch.library.custom_op(
    "mambaflow::conv_backward", _conv_gradients, mutates_args=(),
    schema=f"(Tensor dy, {CONV}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
_conv.register_fake(lambda x, weight, bias: x.new_empty(x.shape))
_conv_backward_op.register_fake(lambda dy, *inputs: tuple(empty_gradients(*inputs)))


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    refuse_transformed("the gradient of conv", CURE_CONV, dy, *ctx.saved_tensors)
    return _conv_backward_op(dy, *ctx.saved_tensors)


_conv.register_autograd(
    _differentiate_conv, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def _without_saved(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of mamba_inner where nothing is saved: each a tensor of its own, as torch asks of
    an operator's outputs."""
    return y, y.new_empty(0), y.new_empty(0), y.new_empty(0), y.new_empty(0)


def _inner_forward(
    xz, weight, bias, to_ranks, to_dt, dt_bias, A, D, save
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output and, where `save`, what its backward pass needs: states, u, ranks and dt."""
    x, z = xz.chunk(2, -1)  # views, which the kernels read by their strides
    u = _conv_forward(x, weight, bias)
    ranks = linear_forward(u.flatten(0, 1), to_ranks, None).view(*u.shape[:2], len(to_ranks))
    low, B, C = ranks.split((to_dt.shape[1], A.shape[1], A.shape[1]), -1)
    dt = linear_forward(low.flatten(0, 1), to_dt, dt_bias).view(u.shape)
    if not save:  # as little memory as there can be: queries may be many
        _scan_into(u, u, dt, A, B, C, D, z, None)
        return _without_saved(u)
    y, saved = _scan_forward(u, dt, A, B, C, D, z, save)
    return y, saved, u, ranks, dt


def _inner_gradients(
    dy, saved, u, ranks, dt, xz, weight, bias, to_ranks, to_dt, dt_bias, A, D
) -> list[Tensor]:
    """The gradients written where they are wanted, not joined and added later."""
    dxz = xz.new_empty(xz.shape)
    (x, z), (dx, dz) = xz.chunk(2, -1), dxz.chunk(2, -1)
    low, B, C = ranks.split((to_dt.shape[1], A.shape[1], A.shape[1]), -1)
    du, ddt, dA, dB, dC, dD = _scan_backward(u, dt, A, B, C, D, z, saved, dy, dz)
    du, ddt, u, low = (v.flatten(0, 1) for v in (du, ddt, u, low))
    dranks = torch.cat(
        (linear_forward(ddt, to_dt.t(), None), dB.flatten(0, 1), dC.flatten(0, 1)), -1
    )
    # u drives the scan and makes the ranks. In place: du is this function's own.
    du += linear_forward(dranks, to_ranks.t(), None)
    dweight, dbias = _conv_backward(x, weight, bias, du, dx)
    # weight_grad may give a transposed view, where the operator has told torch of a dense tensor.
    dto_ranks, dto_dt = weight_grad(dranks, u).contiguous(), weight_grad(ddt, low).contiguous()
    return [dxz, dweight, dbias, dto_ranks, dto_dt, ddt.sum(0), dA, dD]


INNER = (
    "Tensor xz, Tensor weight, Tensor bias, Tensor to_ranks, Tensor to_dt, Tensor dt_bias, "
    "Tensor A, Tensor D"
)
_inner = torch.library.custom_op(
    "mambaflow::mamba_inner", _inner_forward, mutates_args=(),
    schema=f"({INNER}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
_inner_backward_op = torch.library.custom_op(
    "mambaflow::mamba_inner_backward", _inner_gradients, mutates_args=(),
    schema=f"(Tensor dy, Tensor saved, Tensor u, Tensor ranks, Tensor dt, {INNER}) -> Tensor[]",
)  # fmt: skip


@_inner.register_fake
def _(xz, weight, bias, to_ranks, to_dt, dt_bias, A, D, save):
    u = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
    if not save:
        return _without_saved(u)
    ranks = xz.new_empty(*xz.shape[:2], to_ranks.shape[0])
    return *_allocate(u, A, save), u, ranks, torch.empty_like(u)


_inner_backward_op.register_fake(lambda dy, saved, u, ranks, dt, *inputs: empty_gradients(*inputs))


def _differentiate_inner(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    refuse_transformed("the gradient of mamba_inner", CURE_BLOCK, dy, *ctx.saved_tensors)
    return *_inner_backward_op(dy, *ctx.saved_tensors), None  # None for `save`


_inner.register_autograd(_differentiate_inner, setup_context=save_for_backward)
