"""What kernels refuse before they read by address: numbers, devices and shapes that they would
misread."""

import torch
from torch import Tensor

KINDS = (torch.float32, torch.bfloat16, torch.float16)  # the scans compute all in float32


def refuse_kinds(device: torch.device, cure: str, **tensors: Tensor | None) -> None:
    """Refuse tensors whose numbers a kernel would misread.

    Args:
        cure: what to do about double precision, which other backends take.

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


def refuse_scan_shapes(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None
) -> None:
    """Refuse inputs of a scan whose shapes disagree.

    Raises:
        ValueError: u is not (b, n, d), A not (d, s), or another does not fit these.
    """
    if u.dim() != 3 or A.dim() != 2:
        shapes = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"u and A (of shapes {shapes}) must have shapes (b, n, d) and (d, s)")
    if _scan_shapes_fit(u.shape, A.shape, dt, B, C, D, z):
        return
    (b, n, d), s = u.shape, A.shape[1]
    tokens, states = (b, n, d), (b, n, s)
    refuse_shapes(
        dt=(dt, tokens), A=(A, (d, s)), B=(B, states), C=(C, states), D=(D, (d,)), z=(z, tokens)
    )


def _scan_shapes_fit(tokens: torch.Size, rates: torch.Size, dt, B, C, D, z) -> bool:
    """As `refuse_scan_shapes` asks, in a third of the time, which every call takes."""
    (b, n, d), s = tokens, rates[1]
    fits = rates[0] == d and dt.shape == tokens and B.shape == (b, n, s) and C.shape == (b, n, s)
    return fits and D.shape == (d,) and (z is None or z.shape == tokens)


def refuse_conv_shapes(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse inputs of a convolution whose shapes disagree.

    Raises:
        ValueError: x is not (b, n, d), weight not (d, 1, taps), or bias not (d,).
    """
    if x.dim() != 3 or weight.dim() != 3:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(
            f"x and weight (of shapes {shapes}) must have shapes (b, n, d) and (d, 1, taps)"
        )
    d = x.shape[2]
    if weight.shape[:2] != (d, 1) or bias.shape != (d,):
        refuse_shapes(weight=(weight, (d, 1, weight.shape[2])), bias=(bias, (d,)))


def refuse_size(name: str, size: int, most: int, cure: str) -> None:
    """Refuse what the kernels' registers have no room for, and nothing.

    Raises:
        ValueError: not 1 <= size <= most.
    """
    if not 1 <= size <= most:
        raise ValueError(f"{name} (={size}) must be 1 to {most} here; {cure}")
