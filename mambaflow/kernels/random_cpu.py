"""The compiled random words, and pixels ranked by them: the bits of `randomness` and `pixels`."""

import ctypes
import zlib

import torch
from jaxtyping import Int
from torch import Tensor

from mambaflow.kernels.build import kernels, library, pointer


def is_supported(given: Int[Tensor, "..."]) -> bool:
    """Whether there are compiled kernels for these items or counters."""
    return given.device.type == "cpu" and library() is not None


def philox(counter: Int[Tensor, "*n 4"], key: tuple[int, int]) -> Int[Tensor, "*n 4"]:
    """As `data.random_bits.philox`."""
    counter = counter.long().contiguous()
    out = torch.empty_like(counter)
    _call("mambaflow_philox", counter, [counter.numel() // 4], key, out)
    return out


def bits(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], count: int
) -> Int[Tensor, "m count"]:
    """As `data.random_bits.bits`, whose rules the arguments keep."""
    out = item.new_empty((len(item), count), dtype=torch.int64)
    _call("mambaflow_words", item, [len(item), count], (seed, _code(purpose), stream), out)
    return out


def ranked(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], pixels: int, wanted: int
) -> Int[Tensor, "m wanted"]:
    """The places of the `wanted` smallest of each item's `pixels` words, in their order."""
    out = item.new_empty((len(item), wanted), dtype=torch.int64)
    draw = (seed, _code(purpose), stream)
    _call("mambaflow_rank", item, [len(item), pixels, wanted], draw, out)
    return out


def _code(purpose: str) -> int:
    return zlib.crc32(purpose.encode())


def _call(kernel: str, given: Tensor, sizes: list[int], key: tuple[int, ...], out: Tensor) -> None:
    given = given.long().contiguous()
    getattr(kernels(), kernel)(
        pointer(given),
        *map(ctypes.c_int64, sizes),
        *map(ctypes.c_uint32, key),
        pointer(out),
        max(1, min(sizes[0], torch.get_num_threads())),
    )
