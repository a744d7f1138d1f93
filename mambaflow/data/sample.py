"""The embedded sample: crops of photographs out of packages that are installed anyway."""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image

from mambaflow.data.decode import Pixels
from mambaflow.data.random_bits import uniform
from mambaflow.data.remote import SourceError
from mambaflow.data.source import Item, Source, digest

# Photographs inside packages that are installed anyway; no photograph is in two splits.
# camera.png and coins.png are grey, and become three equal channels.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "flower.jpg", "motorcycle_left.png", "rocket.jpg", "camera.png",
              "ihc.png", "retina.jpg", "coins.png"),
    "validation": ("coffee.png", "grace_hopper.jpg"),
    "test": ("chelsea.png", "china.jpg"),
}  # fmt: skip
KEPT_IN = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
}
# A test pins the crops: other numbers below are another data set, and measured figures with it.
SAMPLE_COUNTS = {"train": 4096, "validation": 256, "test": 512}
SAMPLE_SEED, SAMPLE_SIZE = 7, 32
# 9 takes 288 pixels a side; the smallest photograph, chelsea.png, is 300 high. CONTRAST is what the
# standard deviation of a crop's strongest channel must exceed, in bytes.
REDUCTIONS = range(2, 10)
CONTRAST, TRIES = 16.0, 8


@cache
def photograph(name: str) -> Pixels:
    """A photograph from an installed package."""
    # find_spec finds a package's folder without importing it.
    for package, folder in KEPT_IN.items():
        found = find_spec(package)
        if found is not None and found.origin is not None:
            file = Path(found.origin).parent / folder / name
            if file.is_file():
                # Its numbers as they stand: rocket.jpg is in Adobe RGB, and the sample, which is
                # pinned, was cut from what it says as if that were sRGB.
                with Image.open(file) as image:
                    return np.asarray(image.convert("RGB"))
    raise SourceError(f"photograph {name} is in none of {list(KEPT_IN)}; install scikit-image, "
                      "scikit-learn and matplotlib as constraints.txt says")  # fmt: skip


class Sample(Source):
    """The embedded sample: 32 x 32 crops of real photographs, each reduced 2 to 9 times by area.

    Photograph, reduction, place and mirroring are functions of (split, crop number). Crops of
    little contrast, of which sky and background have many, are drawn again, a few times at most.
    """

    name = address = "sample"

    @property
    def fingerprint(self) -> str:
        """Of the photographs."""
        return digest(photograph(n).tobytes() for names in PHOTOGRAPHS.values() for n in names)

    def count(self, split: str) -> int:
        return SAMPLE_COUNTS[split]

    def splits(self, validation: int) -> dict[str, tuple[str, np.ndarray]]:
        """Its own, from other photographs; `validation` takes the first of them."""
        most = SAMPLE_COUNTS["validation"]
        if validation > most:
            raise SourceError(f"validation (={validation}) must be at most {most}, all that the "
                              f"sample has; use {most}")  # fmt: skip
        counts = SAMPLE_COUNTS | {"validation": validation}
        return {split: (split, np.arange(count)) for split, count in counts.items()}

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        # Five numbers a try, for all tries at once: photograph, reduction, across, down, mirror.
        draws = uniform(SAMPLE_SEED, f"sample/{split}", 0, torch.from_numpy(places), 5 * TRIES)
        tries = draws.view(-1, TRIES, 5).tolist()
        for place, chances in zip(places.tolist(), tries, strict=True):
            yield _crop_with_contrast(split, place, chances)


def _crop_with_contrast(split: str, place: int, chances: list[list[float]]) -> Item:
    names = PHOTOGRAPHS[split]
    for which, *how in chances:
        label = int(which * len(names))
        crop = _crop(photograph(names[label]), *how)
        if crop.std((0, 1)).max() > CONTRAST:
            break
    # The last try is kept, whatever its contrast.
    return Item(place, label, crop, f"sample, {split} {place}")


def _crop(
    image: Pixels, reduction: float, across: float, down: float, mirror: float
) -> UInt8[np.ndarray, "32 32 3"]:
    # Draws are below 1: no index is beyond its end.
    factor = REDUCTIONS[int(reduction * len(REDUCTIONS))]
    side = SAMPLE_SIZE * factor
    top, left = int(down * (image.shape[0] - side)), int(across * (image.shape[1] - side))
    # The mean of each factor x factor block, rounded to the nearest byte.
    blocks = image[top : top + side, left : left + side].reshape(
        SAMPLE_SIZE, factor, SAMPLE_SIZE, factor, 3
    )
    crop = (blocks.mean((1, 3)) + 0.5).astype(np.uint8)
    # A view that runs backwards; it is copied when the crops of a shard are stacked.
    return crop[:, ::-1] if mirror < 0.5 else crop
