"""The compiled random words, and pixels ranked by them: the bits of data.random_bits and
data.pixels."""

import ctypes
import zlib

import torch
from jaxtyping import Int
from torch import Tensor

from mambaflow.kernels.build import PLACES, kernels, library, pointer


def is_supported(items: Int[Tensor, "..."]) -> bool:
    """Whether there are compiled kernels for these items or counters."""
    return items.device.type == "cpu" and library() is not None


def philox(counter: Int[Tensor, "*n 4"], key: tuple[int, int]) -> Int[Tensor, "*n 4"]:
    """As `data.random_bits.philox`.

    Raises:
        ValueError: counters that are not of four words each, or as `bits`.
    """
    if counter.shape[-1:] != (4,):
        raise ValueError(f"counter (of shape {tuple(counter.shape)}) must have shape (..., 4)")
    out = counter.new_empty(counter.shape, dtype=torch.int64)
    _call("mambaflow_philox", counter, [counter.numel() // 4], key, out)
    return out


def bits(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], count: int
) -> Int[Tensor, "m count"]:
    """As `data.random_bits.bits`.

    Raises:
        ValueError: seed or stream outside [0, 2^32); item not of whole numbers on CPU.
    """
    out = item.new_empty((len(item), count), dtype=torch.int64)
    _call("mambaflow_words", item, [len(item), count], (seed, _code(purpose), stream), out)
    return out


def ranked(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], pixels: int, wanted: int
) -> Int[Tensor, "m wanted"]:
    """The places of the `wanted` smallest of each item's `pixels` words, in their order.

    Raises:
        ValueError: not 0 <= wanted <= pixels, or pixels not in [1, 2^16]; as `bits`.
    """
    if not (0 <= wanted <= pixels and 1 <= pixels <= PLACES):
        raise ValueError(
            f"wanted (={wanted}) of pixels (={pixels}) must be at most all, and these 1 to {PLACES}"
        )
    out = item.new_empty((len(item), wanted), dtype=torch.int64)
    key = (seed, _code(purpose), stream)
    _call("mambaflow_rank", item, [len(item), pixels, wanted], key, out)
    return out


def _code(purpose: str) -> int:
    """A purpose as a word: the same in every process, as Python's own hash of text is not."""
    return zlib.crc32(purpose.encode())


def _call(kernel: str, items: Tensor, sizes: list[int], key: tuple[int, ...], out: Tensor) -> None:
    if items.device.type != "cpu" or items.is_floating_point() or items.is_complex():
        raise ValueError(
            f"the numbers to draw for (={items.dtype} on {items.device}) must be whole, on cpu"
        )
    if not all(0 <= word < 2**32 for word in key):  # ctypes would drop the bits above
        raise ValueError(f"seed and stream, or key (={key}), must be in [0, 2^32)")
    items = items.long().contiguous()
    getattr(kernels(), kernel)(
        pointer(items),
        *map(ctypes.c_int64, sizes),
        *map(ctypes.c_uint32, key),
        pointer(out),
        max(1, min(sizes[0], torch.get_num_threads())),  # a thread more than rows has no work
    )
