"""The compiled attention as an operator of torch: differentiable, and whole to torch.compile, which
does not look into it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambaflow.kernels.build import dense, int64_array, is_built, kernels, needs_grad, pointer
from mambaflow.kernels.scan_op import empty_gradients
from mambaflow.kernels.transforms import is_transformed, refuse_transformed

CURE = "use models.attention.attend inside the transform, or set MAMBAFLOW_NATIVE=0"


def is_supported(query: Tensor) -> bool:
    """Whether there is a compiled kernel for this: in float32 on CPU, not in a transform."""
    here = query.is_cpu and query.dtype == torch.float32
    return here and is_built() and not is_transformed()


def attend(
    query: Float[Tensor, "b h n e"], key: Float[Tensor, "b h k e"], value: Float[Tensor, "b h k f"]
) -> Float[Tensor, "b h n f"]:
    """softmax(query key') value in float32, of memory O(n + k).

    Raises:
        ValueError: another device or precision, shapes that do not fit one another, or no keys:
            the kernel sees addresses.
        NotImplementedError: derivatives by forward_ad or torch.func.
    """
    _refuse_kinds(query, key, value)
    refuse_shapes(query, key, value)
    inputs = query, key, value
    refuse_transformed("the native attention", CURE, *inputs)
    return _attend(*inputs, needs_grad(*inputs))[0]


def _refuse_kinds(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not (x.is_cpu and x.dtype == torch.float32):
            raise ValueError(
                f"{name} (={x.dtype} on {x.device}) must be float32 on cpu for the native kernel; "
                "use models.attention.attend, which chooses"
            )


def refuse_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what no attention is defined for.

    Raises:
        ValueError: shapes that do not fit one another, or no keys.
    """
    q, k, v = query.shape, key.shape, value.shape
    fits = len(q) == len(k) == len(v) == 4 and q[:2] == k[:2] == v[:2]
    if not (fits and q[3] == k[3] and k[2] == v[2]):
        shapes = ", ".join(f"{tuple(x.shape)}" for x in (query, key, value))
        raise ValueError(
            f"query, key, value (={shapes}) must be (b, h, n, e), (b, h, k, e), (b, h, k, f); "
            "expand what is shared"
        )
    if k[2] == 0:
        raise ValueError("key (=0 tokens) must hold at least one; a mean of none is undefined")


def _shape(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """Sizes and (batch, head, row) strides, as the C functions read them."""
    strides = [s for x in (query, key, value) for s in x.stride()[:3]]
    return int64_array([*query.shape[:3], *key.shape[2:], value.shape[3], *strides])


def _allocate(query: Tensor, value: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for the output and, where `save`, for the maximum and one over the sum of every
    row of scores."""
    rows = query.shape[:3]
    saved = (2, *rows) if save else (0,)
    return query.new_empty(*rows, value.shape[3]), query.new_empty(saved)


def _run(kernel: Any, query: Tensor, key: Tensor, value: Tensor, pointers: list) -> None:
    if kernel(_shape(query, key, value), *pointers, torch.get_num_threads()):
        raise MemoryError(f"no memory for attention over {key.shape[2]:,} keys")


def _forward(query, key, value, save: bool) -> tuple[Tensor, Tensor]:
    # Inside the operator: all is float32 already, so that no gradient comes back through this.
    query, key, value = (dense(x) for x in (query, key, value))
    out, saved = _allocate(query, value, save)
    pointers = [pointer(x) for x in (query, key, value, out, saved if save else None)]
    _run(kernels().mambaflow_attention_forward, query, key, value, pointers)
    return out, saved


def _gradients(dout, out, saved, query, key, value, keys: bool) -> list[Tensor]:
    """Of the query, and where `keys` of key and value."""
    dout, out = dout.contiguous(), out.contiguous()  # read without strides
    query, key, value = (dense(x) for x in (query, key, value))
    grads = empty_gradients(*((query, key, value) if keys else (query,)))
    to = grads if keys else [*grads, None, None]  # null: none is wanted
    pointers = [pointer(x) for x in (query, key, value, out, saved, dout, *to)]
    _run(kernels().mambaflow_attention_backward, query, key, value, pointers)
    return grads


# As in scan_op: `save`, that a backward pass may come, cannot be seen inside; what is saved is an
# output; backward is an operator too.
INPUTS = "Tensor query, Tensor key, Tensor value"
_attend = torch.library.custom_op(
    "mambaflow::attend",
    _forward,
    mutates_args=(),
    schema=f"({INPUTS}, bool save) -> (Tensor, Tensor)",
)
_attend_backward_op = torch.library.custom_op(
    "mambaflow::attend_backward", _gradients, mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor saved, {INPUTS}, bool keys) -> Tensor[]",
)  # fmt: skip
_attend.register_fake(lambda query, key, value, save: _allocate(query, value, save))


_attend_backward_op.register_fake(
    lambda dout, out, saved, query, key, value, keys: empty_gradients(
        *((query, key, value) if keys else (query,))
    )
)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    # The output too: its product with its gradient stands for a sum over all keys.
    ctx.save_for_backward(*output, *inputs[:3])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    refuse_transformed("the native attention's gradient", CURE, dout, *ctx.saved_tensors)
    # Where keys and values want no gradients, two of backward's five products are left out.
    keys = any(ctx.needs_input_grad[1:3])
    grads = _attend_backward_op(dout, *ctx.saved_tensors, keys)
    return *grads, *[None] * (4 - len(grads))


_attend.register_autograd(_differentiate, setup_context=_save_for_backward)
