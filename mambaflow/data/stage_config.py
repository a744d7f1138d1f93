"""What a staging is asked for."""

from dataclasses import dataclass
from typing import Literal

from mambaflow.checks import require


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What to stage, how, and where."""

    source: str = "sample"
    """sample, cifar10, a .parquet file, a folder with train*.parquet, val*.parquet and
    test*.parquet, or a folder of images by class, in train/, val/ and test/ or without them; files
    and folders may be s3://bucket/key and s3://bucket/prefix/, which are read where they lie."""
    out: str = "data/sample"
    """Where to: a folder or s3://bucket/prefix."""
    size: int = 32
    """Side of the images in pixels, once reduced; an image of another shape is refused by name."""
    reduce: int = 1
    """Reduce every image by area first, this many times on a side: 2 makes 16 x 16 of 32 x 32. Ids
    stay those of the images as the source has them."""
    known_ratio: float = 0.2
    """Share of the pixels that are known."""
    target_ratio: float = 0.2
    """Share of the pixels, disjoint from the known, that training asks for."""
    mask_seed: int = 42
    """Seed of the masks."""
    validation: int = 256
    """Training images held out for validation, unless the source has a validation split, which is
    then taken whole; and as many again for testing where the source has no test images."""
    full_images: bool = False
    """Keep whole training images too, for training with fresh masks."""
    rows_per_shard: int = 1024
    """Images in a shard."""
    on_corrupt: Literal["stop", "count"] = "stop"
    """A corrupt image is named, and stops the staging, or is counted and left out."""
    limit: int = 0
    """Stage only as many training images as this, drawn from all of them; a larger limit keeps
    those of a smaller one. 0: all."""
    image_column: str = ""
    """Of Parquet: the column of images; by default img or image."""
    label_column: str = ""
    """Of Parquet: the column of labels; by default label. CIFAR-100 has fine_label."""
    labels: Literal["keep", "ignore"] = "keep"
    """No training uses labels: ignore stages sources that have none, or more than 128 classes."""
    ray: bool = True
    """Fan out over Ray; --no-ray: one shard after the other in this process."""

    def __post_init__(self) -> None:
        # NaN is in no interval, and so is refused as well.
        for name in ("known_ratio", "target_ratio"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} (={value}) must be in (0, 1); use 0.2")
        total = self.known_ratio + self.target_ratio
        require(
            total <= 1,
            f"known_ratio + target_ratio (={total:g}) must be at most 1: the two are disjoint; "
            "use 0.2 and 0.2",
        )
        # 256: a pixel's place must fit in 16 bits, in a shard and where masks are ranked.
        require(1 <= self.size <= 256, f"size (={self.size}) must be in [1, 256]; use 32")
        for name, pixels in (("known_ratio", self.known), ("target_ratio", self.target)):
            require(
                pixels > 0,
                f"{name} (={getattr(self, name)}) keeps no pixel of {self.size} x {self.size}; "
                f"use at least {1 / self.size**2:.3g}",
            )
        require(
            0 <= self.mask_seed < 2**32,
            f"mask_seed (={self.mask_seed}) must be in [0, 2^32); use 42",
        )
        for name in ("rows_per_shard", "validation", "reduce"):
            value = getattr(self, name)
            require(value > 0, f"{name} (={value}) must be positive; use 1 or more")
        require(self.limit >= 0, f"limit (={self.limit}) must not be negative; use 0 for all")

    @property
    def known(self) -> int:
        """Known pixels of an image."""
        # Rounded down: 204 of 1,024 for a fifth.
        return int(self.known_ratio * self.size**2)

    @property
    def target(self) -> int:
        """Pixels of an image that training asks for."""
        return int(self.target_ratio * self.size**2)
