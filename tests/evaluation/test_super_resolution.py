"""Enlarged answers: a perfect field scores without limit, and only on pixel centres."""

import math

import numpy as np
import pytest
import small
import torch
from test_perceptual import random_features, saved
from torch import Tensor
from torch.nn import functional as F

from mambaflow.data.batches import Layout, PixelBatch
from mambaflow.data.pixels import grid
from mambaflow.data.sources import open_source
from mambaflow.evaluation.complete import EvalSet
from mambaflow.evaluation.enlarge import enlarge
from mambaflow.evaluation.perceptual import Perceptual
from mambaflow.evaluation.quality import PERFECT_DB, psnr, ssim
from mambaflow.evaluation.super_resolution import area_reduce, bicubic, enlarged_scores
from mambaflow.flow.samplers import SOLVERS
from mambaflow.models.velocity_field import ConditionedField, VelocityField

SIZE, LARGER = 32, (64, 96, 128, 256)


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


# A perfect field


def saddle(xy: Tensor) -> Tensor:
    """Colours at any places. Along x and along y it is affine: over a square its mean is its value
    in the middle, and so is the mean over any pixel-centred grid in the square."""
    x, y = xy.unbind(-1)
    return torch.stack((0.1 + 0.8 * x * y, 0.9 - 0.7 * x, 0.3 + 0.5 * y), -1)


class Painter(VelocityField):
    """The velocity to the saddle's own colours, wherever it is asked."""

    def condition(self, batch: PixelBatch) -> ConditionedField:
        colours = 2 * saddle(batch.query_xy) - 1

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return (colours - x) / (1 - t[:, None, None])

        return ConditionedField(velocity, None, lambda normal, _: normal(*colours.shape))


def painted(coordinates: str) -> dict[int, Tensor]:
    """The saddle as `enlarge` asks for it at each size."""
    some = EvalSet(
        Layout(SIZE, known=4, target=0, coordinates=coordinates),
        torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8),
        torch.arange(4)[None],
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, SIZE, SIZE, dtype=torch.uint8),
    )
    return enlarge(Painter(small.MODEL), some, [SIZE, *LARGER], SOLVERS["mean"])


def test_a_perfect_field_scores_without_limit_at_every_size():
    found = painted("centre")
    truth = saddle(grid(SIZE)).view(1, SIZE, SIZE, 3)
    for size in LARGER:
        scores = enlarged_scores(found[size], found[SIZE], truth)
        assert scores["psnr_reduced"].item() == scores["psnr_self"].item() == PERFECT_DB


def test_a_field_that_is_asked_on_a_grid_aligned_at_the_corners_is_not_perfect():
    """There the first and the last pixel lie on the image's border, at every size."""
    found = painted("corner")
    truth = saddle(grid(SIZE)).view(1, SIZE, SIZE, 3)
    for size in LARGER:
        line = torch.linspace(0, 1, size)
        places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]
        torch.testing.assert_close(found[size], saddle(places), rtol=0, atol=1e-5)
        scores = enlarged_scores(found[size], found[SIZE], truth)
        assert scores["psnr_reduced"].item() < 65 and scores["psnr_self"].item() < 65


def waves(size: int) -> Tensor:
    """cos 7 x cos 5 y, its mean over each pixel in closed form: the mean of cos over a pixel is the
    difference of sin / frequency at its edges, over its side."""
    edges = torch.arange(size + 1, dtype=torch.float64) / size
    across, down = (size * (k * edges).sin().diff() / k for k in (7.0, 5.0))
    return (0.5 + 0.4 * down[:, None] * across)[None, :, :, None].expand(1, size, size, 3)


@pytest.mark.parametrize("size", LARGER)
def test_pixels_that_are_the_means_of_a_field_score_without_limit(size):
    large, truth = waves(size), waves(SIZE)
    torch.testing.assert_close(area_reduce(large, size // SIZE), truth, rtol=0, atol=1e-12)
    scores = enlarged_scores(large, truth, truth, real=large)
    assert all(scores[name].item() == PERFECT_DB for name in ("psnr_reduced", "psnr_self", "psnr"))
    assert scores["ssim"].item() == pytest.approx(1, abs=1e-9)
    # Wherever the field bends, its pixels are no more what bicubic makes of the coarser ones.
    assert scores["psnr_bicubic"].item() < 80 and scores["rival_psnr"].item() < 80
    half_a_pixel_off = large.roll(1, dims=2)
    assert enlarged_scores(half_a_pixel_off, truth, truth)["psnr_reduced"].item() < 60


# The operators


@pytest.mark.parametrize("factor", [1, 2, 3, 6])
def test_reduction_by_area_is_the_mean_of_each_block(factor):
    large = images(2, 12)
    small_ = area_reduce(large, factor)
    assert small_.shape == (2, 12 // factor, 12 // factor, 3) and small_.dtype == large.dtype
    for b, i, j, channel in np.ndindex(small_.shape):
        block = large[b, factor * i :, factor * j :, channel][:factor, :factor]
        mean = math.fsum(block.flatten().tolist()) / factor**2
        assert small_[b, i, j, channel].item() == pytest.approx(mean, rel=2**-23)


def cubic(x: float) -> float:
    """The kernel of cubic convolution, a = -3/4 (Keys 1981, eq. 15 with a in place of -1/2)."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("size", [7, 10, 14, 21])
def test_bicubic_is_cubic_convolution_between_pixel_centres(size):
    coarse = images(1, 7).double()
    matrix = torch.zeros(size, 7, dtype=torch.float64)
    for i in range(size):
        at = (i + 0.5) / size * 7 - 0.5  # in pixels of the coarse image
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(j, 0), 6)] += cubic(at - j)  # the border's pixels go on beyond it
    wanted = torch.einsum("ih,jw,bhwc->bijc", matrix, matrix, coarse).clamp(0, 1)
    torch.testing.assert_close(bicubic(coarse, size), wanted, rtol=0, atol=1e-6)


# What is scored against what


def test_every_number_is_the_one_that_its_name_says(tmp_path):
    answer, own, truth, real = (images(3, size, seed) for seed, size in enumerate((64, 32, 32, 64)))
    perceptual = Perceptual(saved(tmp_path / "weights.pth", random_features()))
    scores = enlarged_scores(answer, own, truth, real, perceptual)
    for prefix, large in (("", answer), ("rival_", bicubic(own, 64))):
        wanted = {
            "psnr_reduced": psnr(area_reduce(large, 2), truth),
            "psnr_self": psnr(area_reduce(large, 2), own),
            "psnr_bicubic": psnr(large, bicubic(truth, 64)),
            "psnr": psnr(large, real),
            "ssim": ssim(large, real),
            "lpips": perceptual.distances(large, real),
        }
        for name, values in wanted.items():
            assert values.shape == (3,)
            assert torch.equal(scores.pop(prefix + name), values), prefix + name
    assert not scores


def test_without_a_real_image_nothing_is_scored_against_one(tmp_path):
    perceptual = Perceptual(saved(tmp_path / "weights.pth", random_features()))
    scores = enlarged_scores(images(2, 64), images(2, 32), images(2, 32), None, perceptual)
    names = ["psnr_reduced", "psnr_self", "psnr_bicubic"]
    assert [*scores] == [*names, *(f"rival_{name}" for name in names)]
    real = enlarged_scores(images(2, 64), images(2, 32), images(2, 32), images(2, 64))
    assert {*real} - {*scores} == {"psnr", "ssim", "rival_psnr", "rival_ssim"}


def test_bicubic_of_the_truth_agrees_with_itself_and_its_rival_is_as_good():
    truth = images(2, 16)
    scores = enlarged_scores(bicubic(truth, 48), truth, truth)
    assert scores["psnr_bicubic"].tolist() == [PERFECT_DB] * 2
    for name in ("psnr_reduced", "psnr_self", "psnr_bicubic"):
        assert torch.equal(scores[name], scores[f"rival_{name}"])


# Refusals


ONE = images(1, 32)
REFUSED = {
    "no whole multiple": (
        (images(1, 48), ONE, ONE),
        r"answer \(=\(48, 48\)\) must be a whole multiple of the truth's size \(=\(32, 32\)\)",
    ),
    "smaller than the truth": (
        (images(1, 16), ONE, ONE),
        r"answer \(=\(16, 16\)\) must be a whole multiple",
    ),
    "another shape than the truth's": (
        (images(1, 64)[:, :, :32], ONE, ONE),
        r"answer \(=\(64, 32\)\) must be a whole multiple",
    ),
    "an own answer of another size": (
        (images(1, 64), images(1, 64), ONE),
        r"own \(=\(1, 64, 64\)\), truth \(=\(1, 32, 32\)\) must agree",
    ),
    "a real image of another size": (
        (images(1, 64), ONE, ONE, ONE),
        r"answer \(=\(1, 64, 64\)\), real \(=\(1, 32, 32\)\) must agree",
    ),
    "an answer in [-1, 1]": (
        (2 * images(1, 64) - 1, ONE, ONE),
        r"answer \(=-.* image values must be in \[0, 1\]",
    ),
    "a real image in bytes": (
        (images(1, 64), ONE, ONE, 255 * images(1, 64)),
        r"real \(=.* image values must be in \[0, 1\]",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_scored_is_refused_by_name(what, without_shape_checks):
    given, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        enlarged_scores(*given)


def test_operators_refuse_the_sizes_that_they_cannot_make():
    for factor in (-1, 0, 5):
        with pytest.raises(ValueError, match=rf"factor \(={factor}\) must divide the images' hei"):
            area_reduce(ONE, factor)
    with pytest.raises(ValueError, match=r"size \(=31\) must be at least .* use area_reduce"):
        bicubic(ONE, 31)
    with pytest.raises(ValueError, match=r"square images \(=\(32, 16\)\)"):
        bicubic(ONE[:, :, :16], 64)


@pytest.mark.realdata
def test_dense_interpolation_of_real_photographs_scores_as_the_protocol_says(real_cifar):
    """512 test images reduced to 16 x 16 and enlarged from all of their 256 pixels."""
    items = open_source(str(real_cifar)).items("test", np.arange(512))
    real = torch.from_numpy(np.stack([item.pixels for item in items])) / 255
    truth = area_reduce(real, 2)
    planes = truth.permute(0, 3, 1, 2)
    bilinear = F.interpolate(planes, scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
    scores = enlarged_scores(bilinear.clamp(0, 1), truth, truth, real)
    assert scores["psnr"].mean().item() == pytest.approx(25.07, abs=0.05)
    assert scores["rival_psnr"].mean().item() == pytest.approx(26.63, abs=0.05)
