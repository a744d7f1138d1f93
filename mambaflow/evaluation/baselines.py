"""Classical fills of the same masks: what any model must beat.

A fill takes known coordinates and colours and the coordinates asked, for one image, in numpy.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import LinearNDInterpolator, RBFInterpolator
from scipy.spatial import Delaunay, cKDTree
from skimage.restoration import inpaint_biharmonic

Points = Float[np.ndarray, "k 2"]
Colours = Float[np.ndarray, "k 3"]
Asked = Float[np.ndarray, "n 2"]
Filled = Float[np.ndarray, "n 3"]


def nearest(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """The colour of the nearest known pixel."""
    return known_rgb[cKDTree(known_xy).query(query_xy)[1]]


def linear(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """Linear on each Delaunay triangle; the nearest colour outside their hull."""
    _refuse_line(known_xy)
    filled = LinearNDInterpolator(Delaunay(known_xy), known_rgb)(query_xy)
    outside = np.isnan(filled).any(-1)
    filled[outside] = nearest(known_xy, known_rgb, query_xy[outside])
    return filled


def thin_plate(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """The interpolant of least bending energy (Duchon 1977): r^2 log r and an affine part."""
    _refuse_line(known_xy)
    return RBFInterpolator(known_xy, known_rgb, kernel="thin_plate_spline")(query_xy)


def biharmonic(known_xy: Points, known_rgb: Colours, query_xy: Asked) -> Filled:
    """The discrete biharmonic equation on the pixel grid (Damelin & Hoang 2018).

    `query_xy` must be all pixel centres of a square image, row by row; known ones lie on them.
    """
    size = round(len(query_xy) ** 0.5)
    column, row = (np.arange(size * size) % size, np.arange(size * size) // size)
    centres = (np.stack((column, row), -1) + 0.5) / size
    if len(query_xy) != size * size or not np.allclose(query_xy, centres, atol=1e-5):
        raise ValueError(
            f"query_xy (={len(query_xy)} points) must be the pixel centres of a square image, "
            "row by row; use another fill for other coordinates"
        )
    x, y = np.floor(known_xy * size).astype(int).T
    image, missing = np.zeros((size, size, 3)), np.ones((size, size), bool)
    image[y, x], missing[y, x] = known_rgb, False
    return inpaint_biharmonic(image, missing, channel_axis=-1).reshape(-1, 3)


def _refuse_line(known_xy: Points) -> None:
    if np.linalg.matrix_rank(known_xy - known_xy[:1], tol=1e-9) < 2:
        raise ValueError(
            f"known_xy (={len(known_xy)} points) must hold three points off one line; "
            "use the fill 'nearest'"
        )


Fill = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
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
    """
    if name not in FILLS:
        raise ValueError(f"unknown fill {name!r}; valid: {', '.join(FILLS)}")
    if not (rgb.size and rgb.min() >= 0 and rgb.max() <= 1):
        raise ValueError("rgb must hold values in [0, 1]; use (rgb + 1) / 2 or bytes / 255")
    pixels = np.arange(size * size)
    centres = (np.stack((pixels % size, pixels // size), -1) + 0.5) / size
    images = np.empty((len(index), size * size, 3))
    for image, known, colours in zip(images, index, rgb, strict=True):
        image[:] = FILLS[name](centres[known], colours, centres).clip(0, 1)
        image[known] = colours
    return images.reshape(-1, size, size, 3)
