"""Counter-based random numbers: every draw is a function of named integers, never of a state.

Masks, data order, times and noise all come from here, so that a value depends on what it is
for (seed, purpose, image, step) and on nothing else: not on the worker, the device, or what
was drawn before. There is no generator state to save, hence none to restore.
"""

import math
import zlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambaflow.kernels import random_cpu

_MASK = 0xFFFFFFFF
# Philox's constants, as the paper has them for four words of 32 bits.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Int[Tensor, "*n 4"], key: tuple[int, int]) -> Int[Tensor, "*n 4"]:
    """Philox4x32-10: 128 bits of counter to 128 random bits, as four words in [0, 2^32).

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.
    """
    if random_cpu.is_supported(counter):
        return random_cpu.philox(counter, key)
    return _philox(counter, key)


def _philox(counter: Int[Tensor, "*n 4"], key: tuple[int, int]) -> Int[Tensor, "*n 4"]:
    """Philox by torch, on any device: words in int64, where a product of two may wrap its sign,
    which masking undoes."""
    a, b, c, d = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # Of a product's 64 bits the high word is mixed in and the low one goes on.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((right >> 32) & _MASK) ^ b ^ k0,
            right & _MASK,
            ((left >> 32) & _MASK) ^ d ^ k1,
            left & _MASK,
        )
        # Every round has a key of its own.
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((a, b, c, d), -1)


def require_uint32(**values: int) -> None:
    """Refuse what a word of 32 bits cannot hold."""
    for name, value in values.items():
        if not 0 <= value <= _MASK:
            raise ValueError(f"{name} (={value}) must be in [0, 2^32); use a smaller {name}")


def bits(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], count: int
) -> Int[Tensor, "m count"]:
    """`count` random words in [0, 2^32) for each item, a function of all four arguments.

    Args:
        seed: 0 <= seed < 2^32.
        purpose: what the numbers are for ("mask/train", "noise"); other purposes, other numbers.
        stream: a second coordinate such as the step, 0 <= stream < 2^32.
        item: row or image numbers, 0 <= item < 2^62.
        count: words for each item.
    """
    require_uint32(seed=seed, stream=stream)
    if random_cpu.is_supported(item):
        return random_cpu.bits(seed, purpose, stream, item, count)
    return _bits(seed, purpose, stream, item, count)


def _bits(seed: int, purpose: str, stream: int, item: Tensor, count: int) -> Tensor:
    """Words by torch, on any device; random.cpp's are the same."""
    # The counter is (block, low word of the item, high word, stream): the block is of four words,
    # so that a longer draw begins with the shorter one.
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=item.device).expand(len(item), blocks)
    # Views of one number for each item: nothing is copied until they are stacked.
    wide = item[:, None].expand(len(item), blocks)
    lanes = (block, wide & _MASK, wide >> 32, torch.full_like(wide, stream))
    # A checksum, since Python's own hash of text is another in every process.
    key = (seed, zlib.crc32(purpose.encode()))
    return _philox(torch.stack(lanes, -1), key).flatten(1)[:, :count]


def uniform(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], count: int
) -> Float[Tensor, "m count"]:
    """Float32 in the open interval (0, 1): the middles of 2^23 equal cells."""
    # 23 bits: with the half they have 24, all that float32 holds exactly. Neither 0, of which a
    # logarithm is taken, nor 1 can come out.
    return ((bits(seed, purpose, stream, item, count) >> 9).float() + 0.5) * 2.0**-23


def drawn(seed: int, purpose: str, items: Int[Tensor, " m"], count: int) -> Int[Tensor, " n"]:
    """Places of `count` items drawn from all, in the order of the draw; all places as they stand
    where there are no more.

    Whether an item is among them depends on no place, and a longer draw begins with a shorter one.
    """
    if count >= len(items):
        return torch.arange(len(items))
    # By the items first: of two equal words the smaller item's is the first, wherever it stands.
    ascending = items.argsort(stable=True)
    words = bits(seed, purpose, 0, items[ascending], 1)[:, 0]
    return ascending[words.argsort(stable=True)[:count]]


def normal(
    seed: int, purpose: str, stream: int, item: Int[Tensor, " m"], count: int
) -> Float[Tensor, "m count"]:
    """Standard normal float32 by Box and Muller (1958), two for each pair of words."""
    # An odd count drops the second number of the last pair; the others do not move.
    pairs = -(-count // 2)
    u = uniform(seed, purpose, stream, item, 2 * pairs).unflatten(-1, (pairs, 2))
    # Finite, since no u is 0; the largest radius is that of u = 2^-24, 5.8.
    radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :count]
