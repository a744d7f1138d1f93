import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mambaflow.evaluation.metrics import (
    COLUMNS,
    VALIDATED,
    Calibration,
    Completion,
    Moments,
    Quality,
    Scores,
    Speckle,
    psnr,
    ssim,
)


def images(count=6, size=12, seed=0, noise=0.1):
    """Truth with smooth and flat regions, a noisy prediction, and a mask of known pixels."""
    random = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(random.random((count, size, size, 3)), (0, 1, 1, 0))
    truth[:, : size // 2, : size // 2] = random.random((count, 1, 1, 3))
    known = random.random((count, size, size)) < 0.2
    wrong = (truth + noise * random.normal(size=truth.shape)).clip(0, 1)
    prediction = np.where(known[..., None], truth, wrong)
    return torch.tensor(prediction), torch.tensor(truth), torch.tensor(known)


@pytest.mark.parametrize("size", [7, 12, 32])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_ssim_equals_scikit_image(size, noise):
    prediction, truth, _ = images(size=size, noise=noise)
    expected = [
        structural_similarity(x, y, data_range=1, channel_axis=-1)
        for x, y in zip(prediction.numpy(), truth.numpy(), strict=True)
    ]
    assert ssim(prediction, truth).numpy() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_single_precision_images_agrees_to_a_millionth():
    prediction, truth, _ = images(size=32)
    narrow = ssim(prediction.float(), truth.float())
    torch.testing.assert_close(narrow, ssim(prediction, truth), atol=1e-6, rtol=0)


def test_psnr_equals_scikit_image():
    prediction, truth, known = images()
    for where in (None, ~known):
        expected = [
            peak_signal_noise_ratio(
                x[m] if where is not None else x, y[m] if where is not None else y, data_range=1
            )
            for x, y, m in zip(truth.numpy(), prediction.numpy(), ~known.numpy(), strict=True)
        ]
        assert psnr(prediction, truth, where).numpy() == pytest.approx(expected)


def test_copying_known_pixels_is_worth_their_share():
    prediction, truth, known = images(count=1)
    gain = psnr(prediction, truth) - psnr(prediction, truth, ~known)
    assert gain.item() == pytest.approx(-10 * math.log10((~known).double().mean().item()))


def test_a_perfect_image_counts_a_hundred_decibels():
    _, truth, known = images()
    report = Quality().add(truth, truth, known).report()
    assert report["psnr"] == report["psnr_unknown"] == 100
    assert report["ssim"] == pytest.approx(1)


def test_standard_error_is_that_of_the_mean_over_images():
    prediction, truth, known = images()
    values = psnr(prediction, truth).numpy()
    report = Quality().add(prediction, truth, known).report()
    assert report["images"] == 6
    assert report["psnr"] == pytest.approx(values.mean())
    assert report["psnr_se"] == pytest.approx(values.std(ddof=1) / math.sqrt(6))


def counted(kind, prediction, truth, known):
    if kind is Quality:
        return Quality().add(prediction, truth, known)
    if kind is Speckle:
        return Speckle().add(prediction, truth)
    return Calibration().add(prediction, truth.square(), truth, known)


@pytest.mark.parametrize("kind", [Quality, Speckle, Calibration])
@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_any_split_over_workers_in_any_order_gives_the_same_report(kind, cuts, seed):
    batch = images(count=12, seed=seed)
    parts = zip(*(torch.tensor_split(x, sorted(cuts)) for x in batch), strict=True)
    workers = [counted(kind, *part) for part in parts]
    np.random.default_rng(seed).shuffle(workers)
    together = sum(workers, start=kind()).report()
    assert together == pytest.approx(counted(kind, *batch).report(), rel=1e-9, nan_ok=True)


def test_speckle_equals_a_loop_over_windows():
    prediction, truth, _ = images(count=2, size=9, noise=0.05)
    flat, lone, lone_truth, outliers = 0, 0.0, 0.0, 0
    for x, y in zip(prediction.numpy(), truth.numpy(), strict=True):
        for i, j, c in np.ndindex(7, 7, 3):
            window, window_truth = x[i : i + 3, j : j + 3, c], y[i : i + 3, j : j + 3, c]
            if window_truth.std() < 0.03:
                a = abs(window[1, 1] - np.median(window))
                b = abs(window_truth[1, 1] - np.median(window_truth))
                flat, lone, lone_truth = flat + 1, lone + a, lone_truth + b
                outliers += a > 0.08 and b < 0.04
    assert flat > 20
    report = Speckle().add(prediction, truth).report()
    assert report["speckle"] == pytest.approx((lone - lone_truth) / flat)
    assert report["outlier_rate"] == pytest.approx(outliers / flat)


def test_speckle_sees_lone_pixels_only():
    flat = torch.full((1, 20, 20, 3), 0.5)
    shifted, speckled = flat + 0.2, flat.clone()
    speckled[:, 2:-2:4, 2:-2:4] += 0.3  # 16 pixels, no two in one window
    assert Speckle().add(flat, flat).report() == {"speckle": 0, "outlier_rate": 0}
    assert Speckle().add(shifted, flat).report() == {"speckle": 0, "outlier_rate": 0}
    report = Speckle().add(speckled, flat).report()
    assert report["outlier_rate"] == pytest.approx(16 / 18**2)
    assert report["speckle"] == pytest.approx(0.3 * 16 / 18**2)


def test_no_flat_region_has_no_speckle():
    stripes = (torch.arange(9)[:, None] % 2).expand(9, 9)[None, ..., None].expand(1, 9, 9, 3)
    report = Speckle().add(stripes.double(), stripes.double()).report()
    assert math.isnan(report["speckle"]) and math.isnan(report["outlier_rate"])


def fields(seed, blur, count=60, size=24):
    """Noise of unit variance with a known correlation between neighbours."""
    random = np.random.default_rng(seed).normal(size=(count, size, size, 3))
    kernel = np.array([blur, 1.0]) / math.hypot(blur, 1)
    for axis in (1, 2):
        random = ndimage.convolve1d(random, kernel, axis=axis, mode="wrap")
    return torch.tensor(random), blur / (1 + blur**2)


@pytest.mark.parametrize("shrink", [1.0, 0.7])
def test_a_true_sample_has_spread_one_and_the_truths_coherence(shrink):
    sampled, correlation = fields(0, blur=0.8)
    real, _ = fields(1, blur=0.8)
    centre = torch.tensor(np.random.default_rng(2).random(real.shape))
    known = torch.rand(real.shape[:3], generator=torch.Generator().manual_seed(0)) < 0.2
    sums = Calibration().add(centre + shrink * sampled, centre, centre + real, known)
    report = sums.report()
    assert report["spread"] == pytest.approx(shrink**2, rel=0.03)
    assert report["coherence"] == pytest.approx(correlation, abs=0.01)
    assert report["coherence_truth"] == pytest.approx(correlation, abs=0.01)


def test_independent_pixels_have_no_coherence():
    sampled, _ = fields(0, blur=0.0)
    real, correlation = fields(1, blur=0.8)
    nowhere = torch.zeros(real.shape[:3], dtype=torch.bool)
    report = Calibration().add(sampled, torch.zeros_like(real), real, nowhere).report()
    assert report["coherence"] == pytest.approx(0, abs=0.01)
    assert report["coherence_truth"] == pytest.approx(correlation, abs=0.01)


def test_spread_and_coherence_count_unknown_pixels_alone():
    sample, mean, known = images(count=3)
    truth, changed = 1 - sample, sample.clone()
    changed[known] = 17.0
    before, after = (Calibration().add(s, mean, truth, known).report() for s in (sample, changed))
    assert before == after


def test_coherence_is_the_correlation_of_neighbouring_pairs():
    sample, mean, known = images(count=3)
    drawn, pairs = (sample - mean).numpy(), []
    for b, i, j in np.argwhere(~known.numpy()):
        for other in ((b, i + 1, j), (b, i, j + 1)):
            if max(other[1:]) < 12 and not known[other]:
                pairs += [(x, y) for x, y in zip(drawn[b, i, j], drawn[other], strict=True)]
    both_ways = np.array(pairs + [(y, x) for x, y in pairs])
    report = Calibration().add(sample, mean, sample, known).report()
    assert report["coherence"] == pytest.approx(np.corrcoef(both_ways.T)[0, 1])
    assert report["spread"] == pytest.approx(1)


def test_sums_of_nothing_are_not_numbers():
    for kind in (Quality, Calibration, Speckle):
        report = kind().report()
        assert all(math.isnan(v) for key, v in report.items() if key != "images")
    assert math.isnan(Moments().add(torch.ones(1)).standard_error)


def test_what_cannot_be_scored_is_refused_with_the_cure():
    prediction, truth, known = images()
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]; use \(\(rgb \+ 1\) / 2\)"):
        Quality().add(prediction * 2 - 1, truth, known)
    with pytest.raises(ValueError, match="must be in"):
        Speckle().add(prediction * math.nan, truth)
    with pytest.raises(ValueError, match="a pixel to score"):
        Quality().add(prediction, truth, torch.ones_like(known))
    with pytest.raises(ValueError, match="at least 7 a side"):
        ssim(prediction[:, :6], truth[:, :6])


SCORERS = {
    "psnr": lambda x, y, k: psnr(x, y),
    "psnr where": lambda x, y, k: psnr(x, y, ~k),
    "ssim": lambda x, y, k: ssim(x, y),
    "quality": lambda x, y, k: Quality().add(x, y, k),
    "speckle": lambda x, y, k: Speckle().add(x, y),
    "calibration": lambda x, y, k: Calibration().add(x, y, y, k),
}
SHAPES = {"images": (1, 12, 12), "height": (6, 1, 12), "width": (6, 12, 1), "size": (6, 11, 12)}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_other_shapes_are_never_broadcast(scorer, shape):
    prediction, truth, known = images()
    b, h, w = SHAPES[shape]
    # jaxtyping's hook would refuse it first: the message is for users, who have no hook.
    with pytest.raises((ValueError, TypeError), match=r"must agree in images|jaxtyping|type-check"):
        SCORERS[scorer](prediction[:b, :h, :w], truth, known)


def test_a_user_without_shape_checks_is_told_which_shapes_differ():
    code = (
        "import torch; from mambaflow.evaluation.metrics import psnr\n"
        "x, y = torch.rand(1, 8, 8, 3), torch.rand(4, 8, 8, 3)\n"
        "try: print(psnr(x, y))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "prediction (=(1, 8, 8)), truth (=(4, 8, 8))" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_what_lies_outside_the_pixels_scored_is_not_looked_at(value):
    prediction, truth, known = images()
    spoiled = torch.where(known[..., None], value, prediction)
    assert torch.equal(psnr(spoiled, truth, ~known), psnr(prediction, truth, ~known))
    with pytest.raises(ValueError, match="must be finite where known is False"):
        Calibration().add(torch.where(known[..., None], prediction, math.nan), truth, truth, known)


@pytest.mark.parametrize("kind", [Quality, Speckle, Calibration])
def test_no_images_add_nothing(kind):
    batch = images()
    nothing = [x[:0] for x in batch]
    assert counted(kind, *nothing) == kind()
    together = counted(kind, *batch) + counted(kind, *nothing)
    assert together == counted(kind, *batch)


def test_images_too_small_to_have_a_value_off_the_border_have_no_speckle():
    tiny = torch.full((2, 2, 2, 3), 0.5)
    assert Speckle().add(tiny, tiny) == Speckle()


def completion(**changes) -> Completion:
    prediction, truth, known = images()
    return replace(Completion(prediction, truth, known, truth.square(), 16, 0.5), **changes)


@given(cuts=st.lists(st.integers(1, 5), max_size=3, unique=True))
@settings(deadline=None, max_examples=10)
def test_scores_come_back_from_their_numbers_and_merge(cuts):
    parts = torch.tensor_split(torch.arange(6), sorted(cuts))
    whole, found = completion(), Scores()
    for rows in parts:
        part = Scores().add(
            Completion(whole.prediction[rows], whole.truth[rows], whole.known[rows],
                       whole.mean[rows], 16, 0.5)
        )  # fmt: skip
        assert Scores().unflat(iter(part.flat())) == part
        found = found + part
    once = Scores().add(whole).report()
    assert found.report() == pytest.approx(once | {"seconds": 0.5 * len(parts) / 6}, rel=1e-9)
    assert once["nfe"] == 16


def test_a_number_that_is_none_is_left_out():
    report = Scores().add(completion(mean=None, calls=None)).report()
    assert "spread" not in report and "nfe" not in report and report["images"] == 6
    assert not any(math.isnan(v) for v in report.values())
    assert Scores().report() == {"images": 0}


def test_every_column_and_every_curve_is_of_a_number_that_some_metric_reports():
    report = Scores().add(completion()).report()
    assert set(COLUMNS) <= set(report) and set(VALIDATED) <= set(report)
    for column in COLUMNS.values():
        assert not column.error or column.error in report
    assert len({column.title for column in COLUMNS.values()}) == len(COLUMNS)
