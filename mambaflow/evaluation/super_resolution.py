"""What an enlarged answer is worth, without a fake truth.

There is no true 64 x 64 image of a data set of 32 x 32 ones. So an answer is made smaller again
and compared with what there is, or the truth is made smaller before a model sees any of it and the
answer is compared with the real image. A number of each image; pixels are squares, and their values
the mean of the field over them.

    psnr_reduced  the answer reduced by area against the truth at its own size
    psnr_self     the same against the model's own answer at the truth's size
    psnr_bicubic  agreement with the truth enlarged by bicubic, which is no truth
    psnr, ssim, lpips    against a real image of the answer's size, where there is one
    rival_...     the same numbers of the rival: the model's own answer at the truth's size,
                  enlarged by bicubic
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mambaflow.checks import require
from mambaflow.evaluation.perceptual import Perceptual
from mambaflow.evaluation.quality import psnr, ssim
from mambaflow.evaluation.scored_images import Images, require_in_range, require_same_shape

Large = Float[Tensor, "b height width 3"]
PerImage = Float[Tensor, " b"]


def area_reduce(images: Large, factor: int) -> Images:
    """The mean of each factor x factor block.

    Raises:
        ValueError: `factor` does not divide height and width.
    """
    height, width = images.shape[1:3]
    require(
        factor >= 1 and height % factor == 0 and width % factor == 0,
        f"factor (={factor}) must divide the images' height (={height}) and width (={width}); use "
        "a size that is a whole multiple of the smaller one",
    )
    blocks = images.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # (b, h, f, w, f, 3)
    # In float64: a sum of many float32 would round more than the answers that it is to tell apart.
    return blocks.mean((2, 4), dtype=torch.float64).to(images.dtype)


def bicubic(images: Images, size: int) -> Large:
    """Square images enlarged to `size` pixels a side by cubic convolution (Keys 1981, a = -3/4).

    Pixel-centred, clipped to [0, 1]. There is no filter against aliasing, and so no way down.

    Raises:
        ValueError: `size` is below that of the images, or they are not square.
    """
    height, width = images.shape[1:3]
    require(
        height == width <= size,
        f"size (={size}) must be at least that of the square images (={(height, width)}); use "
        "area_reduce to make images smaller",
    )
    planes = images.permute(0, 3, 1, 2)
    large = F.interpolate(planes, size=(size, size), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).permute(0, 2, 3, 1)


def enlarged_scores(
    answer: Large,
    own: Images,
    truth: Images,
    real: Large | None = None,
    perceptual: Perceptual | None = None,
) -> dict[str, PerImage]:
    """Every number of an enlarged answer and of its rival, for each image: see above.

    Args:
        answer: the model's, in [0, 1], of a size that is a whole multiple of the truth's.
        own: the same model's at the truth's size.
        truth: the images whose pixels the model was given.
        real: the real images of the answer's size, of which `truth` is the reduction by area. Where
            that was rounded to bytes, the real image itself has a psnr_reduced of about 59 dB.
        perceptual: adds lpips where there is `real`.

    Raises:
        ValueError: sizes that do not fit, values outside [0, 1].
    """
    require_same_shape(own=own, truth=truth)
    require_in_range(answer=answer, own=own, truth=truth)
    if real is not None:
        require_same_shape(answer=answer, real=real)
        require_in_range(real=real)
    factor = _factor(answer, truth)
    found: dict[str, Tensor] = {}
    for prefix, images in {"": answer, "rival_": bicubic(own, answer.shape[1])}.items():
        scores = _agreement(images, own, truth, factor)
        if real is not None:
            scores |= _fidelity(images, real, perceptual)
        found |= {prefix + name: values for name, values in scores.items()}
    return found


def _agreement(images: Large, own: Images, truth: Images, factor: int) -> dict[str, PerImage]:
    reduced = area_reduce(images, factor)
    return {
        "psnr_reduced": psnr(reduced, truth),
        "psnr_self": psnr(reduced, own),
        "psnr_bicubic": psnr(images, bicubic(truth, images.shape[1])),
    }


def _factor(answer: Large, truth: Images) -> int:
    """How many times larger the answer is, on a side."""
    factor, left = divmod(answer.shape[1], truth.shape[1])
    require(
        left == 0 and factor > 0 and answer.shape[2] == factor * truth.shape[2],
        f"answer (={tuple(answer.shape[1:3])}) must be a whole multiple of the truth's size "
        f"(={tuple(truth.shape[1:3])}) to be reduced by area to it; use {2 * truth.shape[1]}",
    )
    return factor


def _fidelity(images: Large, real: Large, perceptual: Perceptual | None) -> dict[str, PerImage]:
    scores = {"psnr": psnr(images, real), "ssim": ssim(images, real)}
    return scores | ({"lpips": perceptual.distances(images, real)} if perceptual else {})
