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

from mambaflow.evaluation.activity import activity, sextile_edges, sextiles
from mambaflow.evaluation.calibration import AxisSpread, Calibration, SextileSpread
from mambaflow.evaluation.metrics import COLUMNS, SAMPLED, VALIDATED, Scores
from mambaflow.evaluation.quality import Quality, psnr, ssim
from mambaflow.evaluation.scored_images import Completion
from mambaflow.evaluation.speckle import FairSpeckle, Speckle
from mambaflow.evaluation.sums import Moments


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


def sixths(truth):
    """Any sextiles: each pixel's is its own, whatever images lie beside it."""
    return (6 * truth.mean(-1)).clamp(max=5).to(torch.uint8)


def counted(kind, prediction, truth, known):
    sextile, mean = sixths(truth), truth.square()
    given = {
        Quality: (prediction, truth, known),
        Speckle: (prediction, truth),
        FairSpeckle: (prediction, truth, known, 0 * sextile),
        Calibration: (prediction, mean, truth, known),
        SextileSpread: (prediction, mean, truth, known, sextile),
        AxisSpread: (prediction, mean, truth, known),
    }
    return kind().add(*given[kind])


KINDS = [Quality, Speckle, FairSpeckle, Calibration, SextileSpread, AxisSpread]


@pytest.mark.parametrize("kind", KINDS)
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


def test_fair_speckle_equals_a_loop_over_windows():
    prediction, truth, known = images(count=2, size=12, noise=0.05)
    sextile = sixths(truth) // 3  # two kinds of pixels, about as many of each
    found = []
    for x, y, given_, sixth in zip(*(v.numpy() for v in (prediction, truth, known, sextile)),
                                   strict=True):  # fmt: skip
        for i, j, c in np.ndindex(10, 10, 3):
            if given_[i + 1, j + 1] or sixth[i + 1, j + 1]:
                continue
            windows = (image[i : i + 3, j : j + 3, c] for image in (x, y))
            found.append([abs(window[1, 1] - np.median(window)) for window in windows])
    lone, lone_truth = np.array(found).T
    assert 100 < len(found) < 400
    report = FairSpeckle().add(prediction, truth, known, sextile).report()
    assert report["fair_speckle"] == pytest.approx((lone - lone_truth).mean())
    rate = (lone > 0.08).mean() - (lone_truth > 0.08).mean()
    assert report["fair_outlier_rate"] == pytest.approx(rate) and rate > 0


class Process:
    """A law that is known: given the known pixels, all others are Gaussian around grey, neighbours
    correlated, as wide as the known pixels around them are busy. Truth and sample are draws."""

    def __init__(self, count=200, size=24):
        random = np.random.default_rng(0)
        index = random.permuted(np.tile(np.arange(size * size), (count, 1)), axis=1)[:, :120]
        # How busy an image is changes from place to place and tells nothing of a single pixel.
        rough = ndimage.gaussian_filter(random.normal(size=(count, size, size)), (0, 4, 4))
        width = 0.02 * np.exp(rough / rough.std())[..., None]
        known_rgb = 0.5 + width * random.normal(size=(count, size, size, 3))
        images = (255 * known_rgb.clip(0, 1)).round().astype(np.uint8)
        active = activity(images, index)
        self.images, self.width = torch.tensor(images / 255), torch.tensor(active.clip(0.025, 0.1))
        self.known = torch.zeros(count, size * size, dtype=torch.bool)
        self.known.scatter_(1, torch.tensor(index), True)
        self.known = self.known.view(count, size, size)
        self.sextile = torch.tensor(sextiles(active, sextile_edges(active, index)))

    def draw(self, seed, blur=0.8):
        noise, _ = fields(seed, blur, *self.known.shape[:2])
        drawn = (0.5 + self.width[..., None] * noise).clamp(0, 1)
        return torch.where(self.known[..., None], self.images, drawn)

    def speckles(self, sample, truth, key):
        """The score over all images, and its standard error by leaving out a tenth at a time."""
        rows = torch.arange(len(truth)) % 10
        kept = [slice(None), *(rows != part for part in range(10))]
        whole, *parts = [self._score(sample, truth, part)[key] for part in kept]
        return whole, math.sqrt(9 / 10 * sum((x - np.mean(parts)) ** 2 for x in parts))

    def _score(self, sample, truth, rows):
        sample, truth = sample[rows], truth[rows]
        fair = FairSpeckle().add(sample, truth, self.known[rows], self.sextile[rows])
        return Speckle().add(sample, truth).report() | fair.report()


@pytest.fixture(scope="module")
def process():
    return Process()


@pytest.mark.parametrize("key", ["fair_speckle", "fair_outlier_rate"])
def test_a_perfect_sampler_has_a_fair_speckle_of_zero(process, key):
    fair, error = process.speckles(process.draw(1), process.draw(2), key)
    assert abs(fair) < 2.5 * error


def test_a_perfect_sampler_fails_where_the_truth_happens_to_be_flat(process):
    """The mission's own speckle of the same sampler: picked by the truth, it is above 0."""
    sample, truth = process.draw(1), process.draw(2)
    unfair, error = process.speckles(sample, truth, "speckle")
    assert unfair > 10 * error
    assert process.speckles(sample, truth, "fair_speckle")[0] < unfair / 10


def test_fair_speckle_changes_its_sign_where_sample_and_truth_change_places(process):
    """Two draws of one law may change places: a number that then is its negative has mean 0."""
    one, other = process.draw(1), process.draw(2)
    there, back = (process._score(*pair, slice(None)) for pair in ((one, other), (other, one)))
    for key in ("fair_speckle", "fair_outlier_rate"):
        assert there[key] == -back[key] != 0
    assert there["speckle"] > 0 and back["speckle"] > 0


@pytest.mark.parametrize(("blur", "sign"), [(0.0, 1), (None, -1)])
def test_independent_pixels_have_a_fair_speckle_above_zero_and_the_mean_one_below(
    process, blur, sign
):
    mean = torch.where(process.known[..., None], process.images, 0.5)
    sample = mean if blur is None else process.draw(1, blur)
    fair, error = process.speckles(sample, process.draw(2), "fair_speckle")
    assert sign * fair > 10 * error


def test_what_the_busy_and_the_known_pixels_hold_is_no_fair_speckle(process):
    truth, changed = process.draw(2), process.draw(2)
    near = torch.from_numpy(
        ndimage.binary_dilation(
            (~process.known & (process.sextile == 0)).numpy(), np.ones((1, 3, 3), bool)
        )
    )
    changed[~near] = 0.9
    assert FairSpeckle().add(changed, truth, process.known, process.sextile).report() == {
        "fair_speckle": 0, "fair_outlier_rate": 0,
    }  # fmt: skip


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


def test_spread_by_sextile_is_that_of_its_pixels_alone():
    sample, mean, known = images(count=3, size=24)
    truth, sextile = 1 - sample, sixths(sample)
    report = SextileSpread().add(sample, mean, truth, known, sextile).report()
    assert len(report) == 6 and sextile.max() < 6
    for number, spread in enumerate(report.values()):
        where = ~known & (sextile == number)
        if not where.any():
            assert math.isnan(spread)
            continue
        drawn, real = ((image - mean)[where].var() for image in (sample, truth))
        assert spread == pytest.approx((drawn / real).item()), number
    assert sum(not math.isnan(spread) for spread in report.values()) > 3


def test_a_sampler_too_wide_in_the_sky_and_too_narrow_in_the_leaves_is_told(process):
    """Its spread over all pixels is 1."""
    truth, drawn = process.draw(2), process.draw(1)
    calm = (process.sextile < 3)[..., None]
    mean = torch.full_like(truth, 0.5)
    residual = drawn - mean
    unknown = ~process.known[..., None].expand_as(residual)
    of_calm, of_busy = (residual[unknown & c].square().sum() for c in (calm, ~calm))
    narrow = (1 - of_calm / of_busy).sqrt()  # what the calm half gains the busy one loses
    sample = mean + residual * torch.where(calm, 2**0.5, narrow)
    report = SextileSpread().add(sample, mean, truth, process.known, process.sextile).report()
    whole = Calibration().add(sample, mean, truth, process.known).report()["spread"]
    assert whole == pytest.approx(1, abs=0.05)
    assert report["spread_1"] == pytest.approx(2, rel=0.1)
    assert report["spread_6"] == pytest.approx(narrow.item() ** 2, rel=0.1) and narrow < 0.95


def coloured(seed, widths, turn=None, count=4, size=16):
    """Independent Gaussian colours with these standard deviations along the axes of `turn`."""
    noise = torch.tensor(np.random.default_rng(seed).normal(size=(count, size, size, 3)))
    axes = torch.eye(3, dtype=torch.float64) if turn is None else turn
    return noise * torch.tensor(widths).double() @ axes.T


def rotation(seed):
    return torch.linalg.qr(coloured(seed, (1, 1, 1))[0, 0, :3])[0]


NOWHERE = torch.zeros(4, 16, 16, dtype=torch.bool)


def axis_spreads(sample, truth, known=NOWHERE):
    return list(AxisSpread().add(sample, torch.zeros_like(truth), truth, known).report().values())


def test_spread_by_colour_axis_is_what_each_axis_was_stretched_by():
    """The truth varies by 3, 2 and 1 along axes of its own, a sample by 3.3, 2 and 0.5."""
    turn = rotation(1)
    truth = coloured(0, (3, 2, 1))
    # Its own axes exactly: whitened, then stretched.
    centred = truth.flatten(0, 2) - truth.mean((0, 1, 2))
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T.cov(correction=0))).T
    truth, sample = (
        (white * torch.tensor(widths).double() @ turn.T).view(truth.shape)
        for widths in ((3, 2, 1), (3.3, 2, 0.5))
    )
    assert axis_spreads(sample, truth) == pytest.approx([1.21, 1, 0.25])
    assert axis_spreads(sample + 7, truth - 5) == pytest.approx([1.21, 1, 0.25])


def test_spread_by_colour_axis_equals_the_projections_variances():
    truth, sample = coloured(0, (3, 2, 1), rotation(1)), coloured(1, (2, 2, 1), rotation(2))
    known = torch.rand(NOWHERE.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    real, drawn = (image[~known].numpy() for image in (truth, sample))
    _, axes = np.linalg.eigh(np.cov(real.T))
    expected = (drawn @ axes).var(0) / (real @ axes).var(0)
    assert axis_spreads(sample, truth, known) == pytest.approx(expected[::-1])


@pytest.mark.parametrize("seed", range(3))
def test_spread_by_colour_axis_does_not_change_when_all_colours_are_turned(seed):
    truth, sample = coloured(0, (3, 2, 1)), coloured(1, (2, 2, 1), rotation(9))
    turn = rotation(seed)
    assert axis_spreads(sample @ turn, truth @ turn) == pytest.approx(axis_spreads(sample, truth))


def test_an_axis_on_which_the_truth_does_not_vary_has_no_spread():
    grey = coloured(0, (1, 0, 0)).sum(-1, keepdim=True).expand(-1, -1, -1, 3)
    first, *others = axis_spreads(2 * grey, grey)
    assert first == pytest.approx(4) and all(math.isnan(x) for x in others)
    assert all(math.isnan(x) for x in axis_spreads(grey, torch.zeros_like(grey)))


def test_sums_of_nothing_are_not_numbers():
    for kind in KINDS:
        report = kind().report()
        assert all(math.isnan(v) for key, v in report.items() if key != "images")
    assert math.isnan(Moments().add(torch.ones(1)).standard_error)


def test_what_cannot_be_scored_is_refused_with_the_cure():
    prediction, truth, known = images()
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]; use \(\(rgb \+ 1\) / 2\)"):
        Quality().add(prediction * 2 - 1, truth, known)
    with pytest.raises(ValueError, match="must be in"):
        Speckle().add(prediction * math.nan, truth)
    with pytest.raises(ValueError, match="must be in"):
        FairSpeckle().add(prediction + 1, truth, known, sixths(truth))
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
    "fair speckle": lambda x, y, k: FairSpeckle().add(x, y, k, sixths(y)),
    "fair speckle's sextile": lambda x, y, k: FairSpeckle().add(y, y, k, sixths(x)),
    "calibration": lambda x, y, k: Calibration().add(x, y, y, k),
    "spread by sextile": lambda x, y, k: SextileSpread().add(x, y, y, k, sixths(y)),
    "spread by sextile's sextile": lambda x, y, k: SextileSpread().add(y, y, y, k, sixths(x)),
    "spread by axis": lambda x, y, k: AxisSpread().add(x, y, y, k),
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
        "import torch; from mambaflow.evaluation.quality import psnr\n"
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
    nowhere = torch.where(known[..., None], prediction, math.nan)
    for add in (Calibration().add, AxisSpread().add):
        assert add(spoiled, truth, 1 - truth, known) == add(prediction, truth, 1 - truth, known)
        with pytest.raises(ValueError, match="must be finite where known is False"):
            add(nowhere, truth, truth, known)


@pytest.mark.parametrize("kind", KINDS)
def test_no_images_add_nothing(kind):
    batch = images()
    nothing = [x[:0] for x in batch]
    assert counted(kind, *nothing) == kind()
    together = counted(kind, *batch) + counted(kind, *nothing)
    assert together == counted(kind, *batch)


def test_images_too_small_to_have_a_value_off_the_border_have_no_speckle():
    tiny, nowhere = torch.full((2, 2, 2, 3), 0.5), torch.zeros(2, 2, 2)
    assert Speckle().add(tiny, tiny) == Speckle()
    assert FairSpeckle().add(tiny, tiny, nowhere.bool(), nowhere.byte()) == FairSpeckle()


def completion(**changes) -> Completion:
    prediction, truth, known = images(size=24)
    number = torch.arange(truth[..., 0].numel()).view(known.shape)
    sextile = (number % 6).to(torch.uint8)  # pixels of each in every image
    whole = Completion(prediction, truth, known, truth.square(), 16, 0.5, sextile)
    return replace(whole, **changes)


@given(cuts=st.lists(st.integers(1, 5), max_size=3, unique=True))
@settings(deadline=None, max_examples=10)
def test_scores_come_back_from_their_numbers_and_merge(cuts):
    parts = torch.tensor_split(torch.arange(6), sorted(cuts))
    whole, found = completion(), Scores()
    for rows in parts:
        part = Scores().add(
            Completion(whole.prediction[rows], whole.truth[rows], whole.known[rows],
                       whole.mean[rows], 16, 0.5, whole.sextile[rows])
        )  # fmt: skip
        assert Scores().unflat(iter(part.flat())) == part
        found = found + part
    once = Scores().add(whole).report()
    assert found.report() == pytest.approx(once | {"seconds": 0.5 * len(parts) / 6}, rel=1e-9)
    assert once["nfe"] == 16


def test_a_number_that_is_none_is_left_out():
    report = Scores().add(completion(mean=None, calls=None)).report()
    assert "spread" not in report and "nfe" not in report and report["images"] == 6
    assert "spread_1" not in report and "spread_axis_1" not in report and "fair_speckle" in report
    unsorted = Scores().add(completion(sextile=None)).report()
    assert "spread_1" not in unsorted and "fair_speckle" not in unsorted and "spread" in unsorted
    assert not any(math.isnan(v) for v in report.values())
    assert Scores().report() == {"images": 0}


def test_every_column_and_every_curve_is_of_a_number_that_some_metric_reports():
    report = Scores().add(completion()).report()
    assert set(COLUMNS) | set(VALIDATED) | set(SAMPLED.values()) <= set(report)
    for column in COLUMNS.values():
        assert not column.error or column.error in report
    assert len({column.title for column in COLUMNS.values()}) == len(COLUMNS)


def test_no_curve_is_of_both_answers():
    assert not set(SAMPLED) & set(VALIDATED)
    assert SAMPLED["sample_psnr"] == "psnr" and SAMPLED["spread"] == "spread"


def test_spreads_are_of_the_answer_before_clipping_and_images_of_the_one_after():
    """A sample on either side of a mean near black: clipping would halve what lies below."""
    random = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(2, 2, 16, 16, 3, generator=random, dtype=torch.float64)
    mean = torch.full((2, 16, 16, 3), 0.05, dtype=torch.float64)
    truth, known = mean + noise[0].abs(), torch.zeros(2, 16, 16, dtype=torch.bool)
    sample, sextile = mean + noise[1], torch.zeros(2, 16, 16, dtype=torch.uint8)
    clipped = sample.clamp(0, 1)
    whole = Completion(clipped, truth, known, mean, sextile=sextile, unclipped=sample)
    report = Scores().add(whole).report()
    expected = (sample - mean).var() / (truth - mean).var()
    assert report["spread"] == report["spread_1"] == pytest.approx(expected.item())
    axes = AxisSpread().add(sample, mean, truth, known).report()
    assert {key: report[key] for key in axes} == axes
    assert report["psnr"] == pytest.approx(psnr(clipped, truth).mean().item())
    narrow = Scores().add(replace(whole, unclipped=None)).report()
    assert narrow["spread"] < 0.8 * report["spread"] and narrow["psnr"] == report["psnr"]
