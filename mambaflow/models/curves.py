"""Orders of tokens in the plane: space-filling curves, the same at every resolution."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

KEY_BITS = 10  # of a coordinate


def _raster(x: Int[Tensor, "b n"], y: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    return (y << KEY_BITS) | x  # row by row


def _hilbert(x: Int[Tensor, "b n"], y: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Distance along Hilbert's curve (1891), by the turns of its quadrants from the largest."""
    key = torch.zeros_like(x)
    for bit in reversed(range(KEY_BITS)):
        right, up = (x >> bit) & 1, (y >> bit) & 1
        # The quarters in the curve's order, as (right, up): (0, 0), (0, 1), (1, 1), (1, 0).
        key = (key << 2) | ((3 * right) ^ up)
        # In the first and the last quarter the curve lies mirrored, at one diagonal and at the
        # other, so that its ends meet those of its neighbours.
        flip = (up == 0) & (right == 1)
        last = (1 << KEY_BITS) - 1
        # All bits are turned: those above `bit` have been read.
        x, y = torch.where(flip, last - x, x), torch.where(flip, last - y, y)
        x, y = torch.where(up == 0, y, x), torch.where(up == 0, x, y)
    return key


CURVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"raster": _raster, "hilbert": _hilbert}


def curve_key(xy: Float[Tensor, "b n 2"], curve: str) -> Int[Tensor, "b n"]:
    """Place of any coordinates along a space-filling curve of the unit square.

    The curve is the same at every resolution up to 1024 pixels a side, so that any subset of
    any grid, and grids of different resolutions together, can be put in order.
    """
    if curve not in CURVES:
        raise ValueError(f"unknown curve {curve!r}; valid: {', '.join(CURVES)}")
    cells = (xy * (1 << KEY_BITS)).long().clamp(0, (1 << KEY_BITS) - 1)  # 1 is in the last cell
    return CURVES[curve](*cells.unbind(-1))
