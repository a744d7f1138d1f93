"""How busy an image is around each pixel, as far as its known pixels tell.

A place picked by the truth is picked by what no sampler can know, and a perfect one fails there
too. What is picked by known pixels alone is picked alike for the truth and for a sample of it.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.spatial import cKDTree

from mambaflow.checks import require

NEIGHBOURS, SEXTILES = 6, 6
# Rows and columns. Asked a hair above the pixel and less to its left, no two known pixels of an
# image up to 256 a side are equally near: of those that are as far the upper one is first, then the
# left one. 255 hairs do not outweigh a pixel, nor 511 of the second the first.
HAIR = np.array([1e-4, 1e-7])


def activity(
    images: UInt8[np.ndarray, "m h w 3"], known: Int[np.ndarray, "m k"]
) -> Float[np.ndarray, "m h w"]:
    """Standard deviation of the six nearest known colours around each pixel, for a range of 1.

    Channels are pooled: the root of the mean of their three variances. Of fewer than six known
    pixels all count. What is not known is not looked at. A millisecond an image of 32 x 32.

    Args:
        known: places of the known pixels, row x width + column.

    Raises:
        ValueError: no known pixel.
    """
    require(known.shape[1] > 0, "known (=0 an image) must hold a pixel at least; use more")
    pairs = zip(images, known, strict=True)
    found = [_activity(image, index) for image, index in pairs]
    return np.array(found, np.float64).reshape(images.shape[:3])


def _activity(
    image: UInt8[np.ndarray, "h w 3"], known: Int[np.ndarray, " k"]
) -> Float[np.ndarray, " pixels"]:
    height, width, _ = image.shape
    count = min(NEIGHBOURS, len(known))
    asked = _places(np.arange(height * width), width) - HAIR
    # By a list of ranks: for the number 1 the answer would have a dimension less.
    _, near = cKDTree(_places(known, width)).query(asked, k=range(1, count + 1))
    colours = image.reshape(-1, 3)[known].astype(np.float64)[near]  # (pixels, count, 3)
    # Sums of whole numbers, exact in any order: the edges below are the same on every machine.
    scaled = count * (colours**2).sum(1) - colours.sum(1) ** 2  # count^2 x variance
    return np.sqrt(scaled.mean(-1)) / (count * 255)


def _places(index: Int[np.ndarray, " n"], width: int) -> Float[np.ndarray, "n 2"]:
    return np.stack((index // width, index % width), -1).astype(np.float64)


def sextile_edges(
    active: Float[np.ndarray, "m h w"], known: Int[np.ndarray, "m k"]
) -> Float[np.ndarray, " edges"]:
    """The five activities that part all unknown pixels, over all images, into sixths.

    Known pixels are in no edge. None where all pixels are known: there is nothing to tell apart.
    """
    unknown = np.ones((len(active), active[0].size if len(active) else 0), bool)
    np.put_along_axis(unknown, known, False, 1)
    ordered = np.sort(active.reshape(unknown.shape)[unknown])
    # The last of each sixth, rounded up: the edge belongs to the calmer side.
    last = -(-len(ordered) * np.arange(1, SEXTILES) // SEXTILES) - 1
    return ordered[last] if len(ordered) else ordered


def sextiles(
    active: Float[np.ndarray, "m h w"], edges: Float[np.ndarray, " edges"]
) -> UInt8[np.ndarray, "m h w"]:
    """The sixth that each pixel falls in by its activity: 0 is the calmest, 5 the busiest.

    Pixels as active as one another share a sextile, the calmest that one of them falls in: of the
    pixels that the edges were made of, the calmest sextile is never empty.
    """
    return np.searchsorted(edges, active, side="left").astype(np.uint8)
