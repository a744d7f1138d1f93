"""The endless, deterministic stream of training batches, the same for any number of workers.

Sample number p of the stream (p = step x batch size + place in the batch) is row
`RowOrder.row(p)`; its noise, its time and its fresh mask are functions of (seed, p). So a
worker makes its own slice of any step's batch from nothing but the step: there is no state
to save, and no row that it reads is another's.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mambaflow.checks import require
from mambaflow.config import ModelConfig, TrainConfig
from mambaflow.data.device_rows import DeviceRows, gather_pixels, to_device
from mambaflow.data.pixels import choose, grid, to_rgb
from mambaflow.data.random_bits import normal, philox, uniform
from mambaflow.data.shards import Rows, ShardSpec

# Another number of rounds is another order: a run would not go on as it began. The length of a
# stretch is a cache's alone, and changes no row.
FEISTEL_ROUNDS = 6
STRETCH = 2**13


@dataclass(frozen=True)
class PixelBatch:
    """Known pixels, and the queried ones with their true colours."""

    known_xy: Float[Tensor, "b k 2"]
    known_rgb: Float[Tensor, "b k 3"]
    query_xy: Float[Tensor, "b n 2"]
    query_rgb: Float[Tensor, "b n 3"]
    number: Int[Tensor, " b"]
    """Place of each sample in the stream: what its noise and time are functions of. On CPU always,
    where they are drawn: a GPU would need a hundred small kernels for them."""

    def to(self, device: torch.device | str) -> "PixelBatch":
        """The same batch on another device; to a GPU through pinned memory, without waiting."""
        names = [f.name for f in fields(self) if f.name != "number"]
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})

    def noise(self, seed: int, *shape: int) -> Float[Tensor, "b ..."]:
        """Standard normal numbers of each sample, of a shape that begins with the batch; by
        default those of white noise at the queries."""
        shape = shape or tuple(self.query_xy.shape[:2]) + (3,)
        # From the sample's own counter: whichever worker draws it, and with fewer queries the first
        # of the same noise.
        drawn = normal(seed, "noise", 0, self.number, math.prod(shape[1:])).view(shape)
        return to_device(drawn, self.query_xy.device)

    def times(self, seed: int) -> Float[Tensor, " b"]:
        """The uniform draw from which the time of each sample is made."""
        return to_device(uniform(seed, "time", 0, self.number, 1)[:, 0], self.query_xy.device)


class RowOrder:
    """Row of each sample of the stream: in every epoch each row once, shuffled.

    A permutation without a table: a Feistel network over the smallest even number of bits
    that holds the rows, walked until it lands inside (Black & Rogaway 2002). Rows are shuffled
    within blocks of `block` rows and blocks among themselves, so that only the shards of one
    block are open at a time; with one block, which is the rule while all shards fit in
    shard_reader.MEMORY_BYTES, the shuffle is over all. Memory does not grow with the number of
    rows.
    """

    def __init__(self, rows: int, seed: int, block: int = 2**20) -> None:
        require(rows > 0, f"rows (={rows}) must be positive; stage at least one image")
        require(block > 0, f"block (={block}) must be positive; use 2**20")
        self.rows, self.seed, self.block = rows, seed, min(block, rows)
        # A cache of this object's own: one on the method would keep every RowOrder alive. Four hold
        # those of a batch and of the one expected a block later, across two stretches each.
        self._stretch_of = lru_cache(maxsize=4)(self._make_stretch)

    def row(self, number: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """The row of each sample of the stream."""
        epoch, place = number // self.rows, number % self.rows
        block, inside = place // self.block, place % self.block
        whole = self.rows // self.block  # a last, shorter block keeps its place
        # First the blocks among themselves, with salt -1; then the rows of each, with the block's
        # own number as salt.
        shuffled = self._permute(block, whole, epoch, torch.full_like(block, -1))
        block = torch.where(block < whole, shuffled, block)
        rest = self.rows - whole * self.block
        size = torch.where(block < whole, self.block, rest)
        return block * self.block + self._permute(inside, size, epoch, block)

    def stretch(self, first: int, count: int) -> Int[np.ndarray, " count"]:
        """The rows of `count` samples in a row, from stretches that serve many steps: a
        permutation's rounds cost as much for one sample as for hundreds."""
        stretches = range(first // STRETCH, (first + count - 1) // STRETCH + 1)
        found = np.concatenate([self._stretch_of(s) for s in stretches])
        return found[first - stretches[0] * STRETCH :][:count]

    def _make_stretch(self, number: int) -> Int[np.ndarray, " rows"]:
        # A stretch may reach over the end of an epoch: `row` looks at each sample by itself.
        return self.row(torch.arange(number * STRETCH, (number + 1) * STRETCH)).numpy()

    def _permute(
        self, place: Int[Tensor, " m"], size: int | Tensor, epoch: Tensor, salt: Tensor
    ) -> Int[Tensor, " m"]:
        """`place` in [0, size) through the permutation of (seed, epoch, salt)."""
        size = torch.as_tensor(size).expand_as(place)
        # frexp's exponent is the number of bits, exact in float64 for sizes up to 2^53.
        bits = torch.frexp((size - 1).double()).exponent.long()
        half = ((bits + 1) // 2).clamp(min=1)  # of each place's own size, whoever is beside it
        # Places beyond `size` stay where they are, as the last, shorter block does.
        walking = (place < size) & (size > 1)
        # What lands outside goes through the network again until it is inside. That ends, since a
        # permutation's cycle comes back to where it began, and soon, since 2^(2 half) < 4 size.
        while bool(walking.any()):
            walked = self._feistel(place[walking], half[walking], epoch[walking], salt[walking])
            place = place.masked_scatter(walking, walked)
            walking = walking & (place >= size)
        return place

    def _feistel(
        self, place: Int[Tensor, " m"], half: Tensor, epoch: Tensor, salt: Tensor
    ) -> Int[Tensor, " m"]:
        mask = (1 << half) - 1
        left, right = place >> half, place & mask
        for i in range(FEISTEL_ROUNDS):
            # A word is not negative, hence salt + 1. The key's second word is the round here, and
            # the checksum of a purpose where numbers are drawn (see random_bits).
            mixed = philox(torch.stack((right, salt + 1, epoch, half), -1), (self.seed, i))[:, 0]
            left, right = right, left ^ (mixed & mask)
        # A round changes one half by a function of the other, and can be undone whatever the
        # function is: so all of them together are a permutation.
        return (left << half) | right


@runtime_checkable
class RowReader(Protocol):
    """Shards, as far as batches need them."""

    @property
    def shuffle_block(self) -> int: ...

    def __len__(self) -> int: ...

    def rows(
        self, row_numbers: np.ndarray, *, pixels: bool = True, images: bool = True
    ) -> Rows: ...

    def expect(self, row_numbers: np.ndarray) -> None: ...


@dataclass(frozen=True)
class Layout:
    """How many pixels a row holds, and how the model wants its places and colours."""

    size: int
    known: int
    target: int
    coordinates: str = "centre"
    rgb_low: float = -1.0

    @classmethod
    def of(cls, spec: ShardSpec, model: ModelConfig) -> "Layout":
        """The layout of shards for a model."""
        return cls(spec.size, spec.known, spec.target, model.coordinates, model.rgb_low)

    def xy(self, index: Int[Tensor, "b n"]) -> Float[Tensor, "b n 2"]:
        """Where pixels are."""
        # A table of all pixels, made once, and looked up: no arithmetic in a batch.
        places = _places(self.size, self.coordinates, index.device)
        return places.index_select(0, index.reshape(-1)).view(*index.shape, 2)

    def rgb(self, colours: UInt8[Tensor, "b n 3"]) -> Float[Tensor, "b n 3"]:
        """What colours are."""
        return self._stretch(to_rgb(colours))

    def unclipped(self, rgb: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 3"]:
        """Colours of the model on the scale of [0, 1], those beyond it too."""
        return (rgb - self.rgb_low) / (1 - self.rgb_low)

    def image(self, rgb: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 3"]:
        """Colours of the model as [0, 1], clipped."""
        return self.unclipped(rgb).clamp(0, 1)

    def _stretch(self, symmetric: Tensor) -> Tensor:
        low = self.rgb_low
        return symmetric if low == -1 else low + (1 - low) * (symmetric + 1) / 2

    def batch(
        self, index: Int[Tensor, "b m"], colours: UInt8[Tensor, "b m 3"], number: Tensor
    ) -> PixelBatch:
        """The batch in which the first `known` pixels of each row are known."""
        # One look-up for known and asked pixels together; the batch's four are views of it.
        xy, rgb, k = self.xy(index), self.rgb(colours), self.known
        return PixelBatch(xy[:, :k], rgb[:, :k], xy[:, k:], rgb[:, k:], number)


@cache
def _places(size: int, coordinates: str, device: torch.device) -> Float[Tensor, "pixels 2"]:
    # Kept for the process, one for each device: every batch asks for the same.
    xy = grid(size)
    # xy x size - 1/2 is the number of the pixel in its row or column.
    corner = (xy * size - 0.5) / (size - 1)
    return (corner if coordinates == "corner" else xy).to(device)


def require_queries(layout: Layout, config: TrainConfig) -> None:
    """Refuse more queries than the masks leave.

    Raises:
        ValueError: max_queries is beyond the staged targets, or with fresh masks the unknown.
    """
    # Fresh masks choose from whole images, where any pixel that is not known can be asked.
    strict = config.masks == "strict"
    most = layout.target if strict else layout.size**2 - layout.known
    require(
        config.max_queries <= most,
        f"max_queries (={config.max_queries}) must be at most {most} with masks="
        f"{config.masks!r}; use {most}" + (" or --masks fresh" if strict else ""),
    )


class Batches:
    """This worker's slice of each step's batch: `batches[step]`.

    Args:
        device_rows: all rows of the reader, on the device where batches are to be made.
        block: rows that are shuffled together; 0: those whose shards may be open together.
    """

    def __init__(
        self,
        reader: RowReader,
        layout: Layout,
        config: TrainConfig,
        rank: int = 0,
        world_size: int = 1,
        device_rows: DeviceRows | None = None,
        block: int = 0,
    ) -> None:
        require(
            config.batch_size % world_size == 0,
            f"batch_size (={config.batch_size}) must be divisible by world size (={world_size}); "
            f"use {config.batch_size + world_size - config.batch_size % world_size}",
        )
        require_queries(layout, config)
        self.reader, self.layout, self.config = reader, layout, config
        self.rank, self.world_size, self.device_rows = rank, world_size, device_rows
        # The order hangs on the reader's block, and so on how many shards fit in its memory.
        self.order = RowOrder(len(reader), config.seed, block or reader.shuffle_block)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once, the last one partly into the next epoch."""
        return -(-len(self.reader) // self.config.batch_size)

    def __getitem__(self, step: int) -> PixelBatch:
        share = self.config.batch_size // self.world_size
        # A rank's share are samples in a row: joined by rank, the shares are one batch, the same
        # for any number of workers. Rows, masks, noise and times follow from `first` alone.
        first = step * self.config.batch_size + self.rank * share
        rows = self._rows(first, share)
        index, colours = self._pixels(rows, first, self.queries(step))
        return self.layout.batch(index, colours, torch.arange(first, first + share))

    def _rows(self, first: int, share: int) -> DeviceRows:
        numbers = self.order.stretch(first, share)
        if self.device_rows is not None:
            return self.device_rows.take(numbers)
        # Only the columns that these masks use; to gather the others as well took a tenth longer.
        fresh = self.config.masks == "fresh"
        rows = DeviceRows.of(self.reader.rows(numbers, pixels=not fresh, images=fresh))
        # After the rows of now, whose fetches would else wait in line behind these.
        if self.order.block < self.order.rows:  # the shards of the next block, in good time
            self.reader.expect(self.order.stretch(first + self.order.block, share))
        return rows

    def queries(self, step: int) -> int:
        """How many pixels are asked in this step."""
        config = self.config
        most = config.max_queries or self.layout.target
        least = config.min_queries or most
        if least == most:
            return most
        # By the step and not by the sample: all samples of a batch, on all workers, are asked as
        # much.
        draw = uniform(config.seed, "queries", 0, torch.tensor([step]), 1).item()
        return least + int(draw * (most - least + 1))

    def _pixels(
        self, rows: DeviceRows, first: int, n: int
    ) -> tuple[Int[Tensor, "b m"], UInt8[Tensor, "b m 3"]]:
        if self.config.masks == "strict":
            # Staged pixels are in random order: the first n targets are n of them at random.
            m = self.layout.known + n
            return rows.index[:, :m], rows.rgb[:, :m]
        if rows.images is None:
            raise ValueError(
                "masks (='fresh') needs whole training images, and these shards hold only the "
                "staged pixels; stage again with --full-images, or use --masks strict"
            )
        # Drawn on CPU even for rows on a GPU: the index travels, and the pixels are picked there.
        index = to_device(self._fresh(rows.ids, first, n), rows.images.device)
        return index, gather_pixels(rows.images, index)

    def _fresh(self, ids: Int[Tensor, " b"], first: int, n: int) -> Int[Tensor, "b m"]:
        """Masks of this epoch, of the run's own seed: the staged ones are another stream."""
        chosen, config, layout = [], self.config, self.layout
        while len(ids):  # a batch across two epochs has two
            epoch, place = divmod(first, self.order.rows)
            # Rows that are left in this epoch; the rest of the batch has the next one's masks.
            left = self.order.rows - place
            # epoch + 1, since draw 0 is that of staging: with the mask seed as its own a run would
            # else have the staged masks in its first epoch.
            chosen.append(choose(config.seed, "train", ids[:left], layout.size, layout.known, n,
                                 draw=epoch + 1))  # fmt: skip
            ids, first = ids[left:], first + left
        return torch.cat(chosen)


@runtime_checkable
class Stream(Protocol):
    """Batches by step."""

    def __getitem__(self, step: int) -> PixelBatch: ...


def _work_for(device: torch.device) -> None:
    """Have this thread use a worker's own GPU; pinning would open another one on the first."""
    if device.type == "cuda":
        # CUDA's current device is a thread's own: a new thread begins with the first GPU.
        torch.cuda.set_device(device)


class Prefetcher:
    """The next steps' batches, made in a thread and on their way to the GPU while one trains.

    Not for training on CPU: a second thread there needs the same cores, and with more OpenMP
    threads than cores each of them sleeps at every barrier.

    Args:
        steps: there are no batches from this step on.
    """

    def __init__(self, stream: Stream, device: torch.device, steps: int, depth: int = 8) -> None:
        self.stream, self.device, self.steps, self.depth = stream, device, steps, depth
        # One thread: batches are made in the order of their steps, and a ShardSet is for one thread
        # at a time.
        self._pool = ThreadPoolExecutor(1, "batches", _work_for, (device,))
        self._coming: dict[int, Future[PixelBatch]] = {}

    def __getitem__(self, step: int) -> PixelBatch:
        # The step that is asked for is always among them, even beyond the last.
        wanted = range(step, max(step + 1, min(step + self.depth, self.steps)))
        coming = self._coming
        # Built anew at every step: batches that a jump left behind are let go.
        self._coming = {n: coming.get(n) or self._pool.submit(self._make, n) for n in wanted}
        # An error of the thread is raised here, at the step whose batch it was.
        return self._coming.pop(step).result()

    def _make(self, step: int) -> PixelBatch:
        return self.stream[step].to(self.device)

    def close(self) -> None:
        """Leave what is not made yet."""
        self._pool.shutdown(wait=False, cancel_futures=True)
