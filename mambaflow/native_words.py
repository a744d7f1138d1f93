"""The compiled random words, and pixels ranked by them: the bits of `randomness` and `pixels`."""

import ctypes
import zlib

import torch
from jaxtyping import Int
from torch import Tensor

from mambaflow.native import NativeError, library


def serves(item: Int[Tensor, " m"]) -> bool:
    """Whether there are compiled kernels for these items."""
    return item.device.type == "cpu" and library() is not None


def words(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], count: int
) -> Int[Tensor, "m count"]:
    """As `randomness.words`, whose rules the arguments keep."""
    out = torch.empty((len(item), count), dtype=torch.int64)
    _call("mambaflow_words", item, [count], (seed, purpose, stream), out)
    return out


def ranked(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], pixels: int, wanted: int
) -> Int[Tensor, "m wanted"]:
    """The places of the `wanted` smallest of each item's `pixels` words, in their order."""
    out = torch.empty((len(item), wanted), dtype=torch.int64)
    _call("mambaflow_rank", item, [pixels, wanted], (seed, purpose, stream), out)
    return out


def _call(
    kernel: str, item: Tensor, sizes: list[int], draw: tuple[int, str, int], out: Tensor
) -> None:
    loaded, (seed, purpose, stream) = library(), draw
    if loaded is None:
        raise NativeError("there are no compiled kernels here; ask serves() first")
    item = item.long().contiguous()
    getattr(loaded, kernel)(
        ctypes.c_void_p(item.data_ptr()),
        *map(ctypes.c_int64, (len(item), *sizes)),
        *map(ctypes.c_uint32, (seed, zlib.crc32(purpose.encode()), stream)),
        ctypes.c_void_p(out.data_ptr()),
        torch.get_num_threads(),
    )
