"""Rows as tensors, a column each, on whichever device."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mambaflow.data.shard_reader import ShardSet
from mambaflow.data.shards import Rows

SHARE = 4  # of a GPU's free memory, one part at most goes to the data set


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device; to a GPU through pinned memory, without waiting."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        # From pageable memory, or from a slice, torch copies by way of memory of its own, and
        # waits. It gives pinned memory back only when the copy from it has been made: `x` may go.
        x = x.contiguous().pin_memory()
    # Without waiting: what is queued on the GPU after this reads it when it is there.
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class DeviceRows:
    """Rows as batches are made from them."""

    ids: Int[Tensor, " m"]
    """On CPU always: masks are drawn there."""
    index: Int[Tensor, "m p"]
    rgb: UInt8[Tensor, "m p 3"]
    images: UInt8[Tensor, "m pixels 3"] | None

    @classmethod
    def of(cls, rows: Rows, images: bool = True) -> "DeviceRows":
        """The same rows on CPU, with whole images or without; only the index is copied."""
        m, p = rows.index.shape
        # from_numpy and view copy nothing: the tensors are the arrays' memory.
        whole = rows.images if images else None
        return cls(
            torch.from_numpy(rows.ids),
            # torch looks nothing up by uint16; int32 is half as much to send as int64.
            torch.from_numpy(rows.index.astype(np.int32)),
            torch.from_numpy(rows.rgb).view(m, p, 3),
            None if whole is None else torch.from_numpy(whole).view(m, -1, 3),
        )

    @property
    def nbytes(self) -> int:
        """Memory that the rows take."""
        # Of the columns that go to a device; ids stay on CPU.
        columns = (self.index, self.rgb, self.images)
        return sum(c.nbytes for c in columns if c is not None)

    def to(self, device: torch.device) -> "DeviceRows":
        """The same rows on another device."""
        images = None if self.images is None else self.images.to(device)
        return DeviceRows(self.ids, self.index.to(device), self.rgb.to(device), images)

    def take(self, rows: Int[np.ndarray, " n"]) -> "DeviceRows":
        """Some of the rows, copied."""
        # Ids are gathered on CPU and the other columns where they lie, so the numbers go to both.
        here = torch.from_numpy(rows)
        there = to_device(here, self.index.device)
        # index_select copies a row at a time, where x[rows] goes number by number: twenty times as
        # long for a batch of masks.
        images = None if self.images is None else self.images.index_select(0, there)
        index, rgb = self.index.index_select(0, there), self.rgb.index_select(0, there)
        return DeviceRows(self.ids.index_select(0, here), index, rgb, images)


def device_resident(shards: ShardSet, device: torch.device, images: bool) -> DeviceRows | None:
    """All rows in the memory of the GPU that trains, so that no batch has to travel; None on CPU,
    and where they are more than memory for shards holds or a quarter of what the GPU has free.

    Args:
        images: whole images too, where the shards hold them.
    """
    # A block smaller than the split: not all shards may be open at once.
    if device.type != "cuda" or shards.shuffle_block < len(shards):
        return None
    rows = DeviceRows.of(shards.rows(np.arange(len(shards))), images)
    free, _ = torch.cuda.mem_get_info(device)
    if rows.nbytes > free // SHARE:
        return None
    # The open shards' memory is given back first: while the rows travel, CPU holds them once.
    shards.forget()
    return rows.to(device)


def gather_pixels(
    images: UInt8[Tensor, "b p 3"], index: Int[Tensor, "b m"]
) -> UInt8[Tensor, "b m 3"]:
    """The pixels of each image at its own index."""
    b, p, _ = images.shape
    # The pixels of all images as one list, image after image: one number for each pixel picks its
    # three bytes. `gather`, with a number for each byte, takes twice as long, and [] three times.
    flat = index + torch.arange(0, b * p, p, device=index.device)[:, None]
    return images.flatten(0, 1).index_select(0, flat.view(-1)).view(*index.shape, 3)
