"""An image and its sparse pixels: which are known, where they are, in which order they are read."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mambaflow.data.random_bits import bits, require_uint32
from mambaflow.kernels import random_cpu
from mambaflow.kernels.build import PLACES

PLACE_BITS = (PLACES - 1).bit_length()  # of a pixel in its image: at most 256 x 256


def choose(
    seed: int,
    split: str,
    ids: Int[Tensor, " m"],
    size: int,
    known: int,
    target: int,
    *,
    draw: int = 0,
) -> Int[Tensor, "m count"]:
    """Indices (row x size + column) of `known` known and then `target` asked pixels, disjoint.

    They depend on (seed, split, image id, draw) and nothing else: the pixels of an image are
    ranked by random words of their own.

    Args:
        draw: 0 for the mask of the data set, epoch + 1 for the fresh mask of an epoch.
    """
    # PLACES is what the low bits of a ranked word hold, here and in random.cpp.
    pixels = size * size
    if pixels > PLACES:
        raise ValueError(f"size (={size}) must be at most 256; crop or reduce the images")
    if not (known > 0 and target >= 0 and known + target <= pixels):
        raise ValueError(
            f"known (={known}) + target (={target}) must be in [1, {pixels}], the pixels of an "
            f"image of size {size}; use ratios that add up to at most 1"
        )
    require_uint32(seed=seed, draw=draw)
    # The split is in the purpose: image 7 of training and image 7 of the test split have masks of
    # their own. Known pixels rank first: more targets leave them where they are.
    purpose, wanted = f"mask/{split}", known + target
    if random_cpu.is_supported(ids):
        # Compiled, it ranks little more than the words that are wanted; the same pixels as below.
        return random_cpu.ranked(seed, purpose, draw, ids, pixels, wanted)
    return _ranked(bits(seed, purpose, draw, ids, pixels))[:, :wanted]


def _ranked(bits32: Int[Tensor, "m pixels"]) -> Int[Tensor, "m pixels"]:
    """Stable argsort of 32-bit words, by sorting them with their places in the low bits.

    NumPy sorts whole numbers with vector instructions, several times faster than an argsort.
    """
    pixels = bits32.shape[-1]
    # 32 bits of word over 16 of place: 48 bits, positive as int64. Equal words are told apart by
    # their places, so that any sort of these is a stable sort of the words.
    packed = bits32 << PLACE_BITS | torch.arange(pixels, device=bits32.device)
    if packed.is_cuda:
        packed = packed.sort(-1).values
    else:
        # In place: the array is the tensor's memory.
        packed.numpy().sort(-1)
    # The words are dropped, and the places are left in their order.
    return packed & ((1 << PLACE_BITS) - 1)


def coordinates(index: Int[Tensor, "*m"], size: int) -> Float[Tensor, "*m 2"]:
    """Pixel centres (x, y) in (0, 1)."""
    return (torch.stack((index % size, index // size), -1) + 0.5) / size


def grid(size: int) -> Float[Tensor, "pixels 2"]:
    """The pixel centres of an image, row by row."""
    return coordinates(torch.arange(size * size), size)


def reduced(image: UInt8[np.ndarray, "height width 3"], reduce: int) -> UInt8[np.ndarray, "h w 3"]:
    """An image made smaller by area: the mean of each reduce x reduce block, halves rounded up.

    Raises:
        ValueError: `reduce` does not divide height and width.
    """
    height, width, _ = image.shape
    common = math.gcd(height, width)
    if reduce < 1 or common % reduce:
        raise ValueError(
            f"reduce (={reduce}) must divide height (={height}) and width (={width}); use a "
            f"divisor of {common}"
        )
    blocks = image.reshape(height // reduce, reduce, width // reduce, reduce, 3)
    # In whole numbers: floor(sum / area + 1/2), the same bytes on every machine.
    area, sums = reduce * reduce, blocks.sum((1, 3), dtype=np.int64)
    return ((2 * sums + area) // (2 * area)).astype(np.uint8)


def to_rgb(colours: UInt8[Tensor, "*m"]) -> Float[Tensor, "*m"]:
    """Bytes to [-1, 1]."""
    # In place on the copy that float() made: no more than one tensor a call.
    return colours.float().div_(127.5).sub_(1)


def copy_known(
    rgb: Float[Tensor, "b n 3"], index: Int[Tensor, "b k"], known: Float[Tensor, "b k 3"]
) -> Float[Tensor, "b n 3"]:
    """A full image in which the known pixels have their own colours exactly."""
    # No place is known twice, so that the order of writing does not matter.
    return rgb.scatter(1, index[..., None].expand(-1, -1, 3), known)


def unknown(known: Int[Tensor, "m k"], size: int) -> Int[Tensor, "m n"]:
    """The pixels that are not known, in raster order."""
    mask = torch.ones((len(known), size * size), dtype=torch.bool)
    mask.scatter_(1, known, False)
    # nonzero goes row by row, and every row has as many unknown pixels: they are a table again.
    return mask.nonzero()[:, 1].view(len(known), -1)
