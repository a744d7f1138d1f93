"""Classical fills of the same masks: what any model must beat.

A fill takes known places and colours and the places asked, for one image, in numpy. Places are
(x, y) in [0, 1], the image. All fills share one border, `_fill`, which refuses what none of them
can answer.
"""

from collections.abc import Callable
from functools import wraps

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import LinearNDInterpolator, RBFInterpolator
from scipy.spatial import Delaunay, cKDTree
from skimage.restoration import inpaint_biharmonic

from mambaflow.checks import lookup, require

Points = Float[np.ndarray, "k 2"]
Colours = Float[np.ndarray, "k 3"]
Asked = Float[np.ndarray, "n 2"]
Filled = Float[np.ndarray, "n 3"]
Fill = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# Known places nearer than this are one: pixels of an image 65536 wide are 15 times as far apart,
# and a thin plate through two that are nearer keeps fewer than 6 of its 16 digits.
ONE_PLACE = 1e-6


def _fill(fill: Fill) -> Fill:
    """The border of a fill: it is asked for one place at least, in float64, of known places that
    are all different.

    Raises:
        ValueError: shapes that do not fit, no known place, places outside [0, 1], colours that
            are not finite, or two colours at one place. Two places of one colour count once.
    """

    @wraps(fill)
    def checked(known_xy: np.ndarray, known_rgb: np.ndarray, query_xy: np.ndarray) -> np.ndarray:
        known_xy, query_xy = _places("known_xy", known_xy), _places("query_xy", query_xy)
        known_rgb = _colours(known_rgb, len(known_xy))
        require(len(known_xy) > 0, "known_xy (=0 points) must hold at least one; use a known pixel")
        if len(query_xy) == 0:
            return np.empty((0, 3))
        # A place that is given twice would make the equations of a thin plate singular.
        return fill(*_distinct(known_xy, known_rgb), query_xy)

    return checked


def _places(name: str, xy: np.ndarray) -> Points:
    xy = np.asarray(xy, np.float64)
    require(
        xy.ndim == 2 and xy.shape[1] == 2,
        f"{name} (of shape {xy.shape}) must be (points, 2); use np.stack((x, y), -1)",
    )
    outside = xy[~((xy >= 0) & (xy <= 1)).all(1)]  # NaN too
    require(
        len(outside) == 0,
        f"{name} (={outside[:1].tolist()}, {len(outside)} of {len(xy)}) must be in [0, 1]; "
        "use (pixel + 0.5) / size",
    )
    return xy


def _colours(rgb: np.ndarray, known: int) -> Colours:
    rgb = np.asarray(rgb, np.float64)
    require(
        rgb.shape == (known, 3),
        f"known_rgb (of shape {rgb.shape}) must be ({known}, 3), a colour for each of known_xy; "
        "use as many of both",
    )
    bad = rgb[~np.isfinite(rgb).all(1)]
    require(
        len(bad) == 0,
        f"known_rgb (={bad[:1].tolist()}, {len(bad)} of {known}) must be finite; use values "
        "in [0, 1]",
    )
    return rgb


def _distinct(
    xy: Points, rgb: Colours
) -> tuple[Float[np.ndarray, "kept 2"], Float[np.ndarray, "kept 3"]]:
    """Each place once, in the order given."""
    # Pairs by number, the earlier first; by a tree, without all k x k distances.
    first, second = cKDTree(xy).query_pairs(ONE_PLACE, output_type="ndarray").T
    # One colour twice is no contradiction.
    torn = (rgb[first] != rgb[second]).any(1)
    require(
        not bool(torn.any()),
        f"known_xy (={xy[first[torn]][:1].tolist()}, {torn.sum()} pairs) must have one colour at "
        f"each place, all within {ONE_PLACE} being one; use the mean of its colours",
    )
    kept = np.delete(np.arange(len(xy)), second)  # of each pair the later goes
    return xy[kept], rgb[kept]


@_fill
def nearest(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """The colour of the nearest known pixel."""
    return known_rgb[cKDTree(known_xy).query(query_xy)[1]]


@_fill
def linear(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """Linear on each Delaunay triangle; the nearest colour outside their hull."""
    _refuse_line(known_xy)
    filled = LinearNDInterpolator(Delaunay(known_xy), known_rgb)(query_xy)
    # So scipy marks places outside the hull.
    outside = np.isnan(filled).any(-1)
    filled[outside] = nearest(known_xy, known_rgb, query_xy[outside])
    return filled


@_fill
def thin_plate(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """The interpolant of least bending energy (Duchon 1977): r^2 log r and an affine part."""
    _refuse_line(known_xy)
    # All known places at once, one dense system: exact, and of cost k^3.
    return RBFInterpolator(known_xy, known_rgb, kernel="thin_plate_spline")(query_xy)


@_fill
def biharmonic(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """The discrete biharmonic equation on the pixel grid (Damelin & Hoang 2018).

    `query_xy` must be all pixel centres of a square image, row by row; known ones lie on them.
    """
    size = round(len(query_xy) ** 0.5)
    require(
        len(query_xy) == size * size and np.allclose(query_xy, centres(size), atol=1e-5),
        f"query_xy (={len(query_xy)} points) must be the pixel centres of a square image, "
        "row by row; use another fill for other coordinates",
    )
    # A place at 1 would be in a column that is not there; that it is no centre is seen below.
    column, row = np.minimum(known_xy * size, size - 1).astype(int).T
    known = row * size + column
    require(
        np.allclose(known_xy, query_xy[known], atol=1e-5),
        f"known_xy (={len(known_xy)} points) must lie on pixel centres; use another fill",
    )
    # scikit-image takes an image with holes and the mask of its holes, and clips what it fills to
    # the range of the known colours.
    image, missing = np.zeros((size * size, 3)), np.ones(size * size, bool)
    image[known], missing[known] = known_rgb, False
    image, missing = image.reshape(size, size, 3), missing.reshape(size, size)
    return inpaint_biharmonic(image, missing, channel_axis=-1).reshape(-1, 3)


def centres(size: int) -> Points:
    """The pixel centres of a square image, row by row."""
    pixels = np.arange(size * size)
    return (np.stack((pixels % size, pixels // size), -1) + 0.5) / size


def _refuse_line(known_xy: Points) -> None:
    """Refuse points on a line, to one part in 10^8: they leave the colours beside it undecided."""
    # Extents along and across the best line through the first place: across it, none on a line.
    spread = np.linalg.svd(known_xy - known_xy[:1], compute_uv=False)
    require(
        len(known_xy) >= 3 and bool(spread[1] > 1e-8 * spread[0]),
        f"known_xy (={len(known_xy)} points) must hold three points off one line; "
        "use the fill 'nearest'",
    )


FILLS: dict[str, Fill] = {
    "nearest": nearest,
    "linear": linear,
    "thin-plate": thin_plate,
    "biharmonic": biharmonic,
}


def fill_images(
    name: str, index: Int[np.ndarray, "m k"], rgb: Float[np.ndarray, "m k 3"], size: int
) -> Float[np.ndarray, "m h w 3"]:
    """Whole images from their known pixels, clipped to [0, 1], known pixels copied exactly.

    Args:
        index: row x size + column of the known pixels.
        rgb: their colours in [0, 1].

    Raises:
        ValueError: an unknown fill, an index outside the image, colours that are not one in
            [0, 1] for each index, or what the fill refuses.
    """
    fill = lookup(FILLS, name, "fill")
    require(
        index.dtype.kind in "iu" and bool(((index >= 0) & (index < size * size)).all()),
        f"index must hold whole numbers in [0, {size * size}), the pixels of an image of size "
        f"(={size}); use row * size + column",
    )
    require(
        rgb.shape == (*index.shape, 3),
        f"rgb (of shape {rgb.shape}) must be {(*index.shape, 3)}, a colour for each of index; "
        "use as many of both",
    )
    require(
        bool(((rgb >= 0) & (rgb <= 1)).all()),  # false for NaN
        "rgb must hold values in [0, 1]; use (rgb + 1) / 2 or bytes / 255",
    )
    xy = centres(size)  # (size^2, 2)
    images = np.empty((len(index), size * size, 3))
    for image, known, colours in zip(images, index, rgb, strict=True):
        image[:] = fill(xy[known], colours, xy).clip(0, 1)  # smooth fills overshoot
        image[known] = colours  # fills meet them to rounding alone
    return images.reshape(-1, size, size, 3)
