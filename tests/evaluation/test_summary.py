"""What rows come to: means over images with their errors, sums pooled over pixels, pairs."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from small import LAYOUT, TEST

from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.cells import NO_CHECKPOINT, Cell, Key, Unit
from mambaflow.evaluation.complete import EvalSet, complete
from mambaflow.evaluation.fine_spread import FineSpread
from mambaflow.evaluation.metrics import Scores
from mambaflow.evaluation.reliability import Reliability
from mambaflow.evaluation.rows import NUMBERS, Results, row
from mambaflow.evaluation.summary import Summary, Way, mean_and_error
from mambaflow.flow.samplers import SOLVERS
from mambaflow.storage import at

HEUN = Cell("A", "heun", "", 4, 12, 28, 0)
MEAN = replace(HEUN, sampler="mean", nfe=1)
LINEAR = Cell(NO_CHECKPOINT, "linear", "", 0, 12, 28, 0)
PART = replace(HEUN, asked=20)
IMAGES = [7, 3, 11, 5]


def kept(tmp_path, rows) -> Summary:
    """The summary of rows that went through files."""
    results, cells = Results(at(tmp_path)), defaultdict(list)
    for one in rows:
        cells[Cell(*(one[name] for name in vars(HEUN)))].append(one)
    for group, (cell, found) in enumerate(cells.items()):
        ids = tuple(dict.fromkeys(one["image"] for one in found))
        samples = tuple(dict.fromkeys(one["sample"] for one in found))
        results.write(Unit(cell, group, ids, samples), found)
    return Summary(results.read())


def made_up(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(20, 3, count)


# --- Numbers of images --------------------------------------------------------------------------


def test_a_number_is_the_mean_over_images_with_its_standard_error(tmp_path):
    values = {name: made_up(i, len(IMAGES)) for i, name in enumerate(NUMBERS)}
    rows = [
        row(Key(MEAN, image, 0), **{name: values[name][i] for name in NUMBERS})
        for i, image in enumerate(IMAGES)
    ]
    summary = kept(tmp_path, rows)
    entry = summary.entries[Way(MEAN)]
    assert entry.images == len(IMAGES) and entry.failed == 0
    for name in NUMBERS:
        assert entry.numbers[name] == pytest.approx(values[name].mean(), rel=1e-12)
        error = values[name].std(ddof=1) / math.sqrt(len(IMAGES))
        assert entry.numbers[f"{name}_se"] == pytest.approx(error, rel=1e-12)
        expected = dict(zip(IMAGES, values[name], strict=True))
        assert summary.values(Way(MEAN), name) == pytest.approx(expected)


def test_what_no_row_has_is_no_number(tmp_path):
    entry = kept(tmp_path, [row(Key(MEAN, i, 0), psnr=20.0) for i in IMAGES]).entries[Way(MEAN)]
    assert set(entry.numbers) == {"psnr", "psnr_se"}
    assert entry.reliability == []


def test_one_image_has_no_standard_error(tmp_path):
    entry = kept(tmp_path, [row(Key(MEAN, 7, 0), psnr=20.0)]).entries[Way(MEAN)]
    assert entry.numbers == {"psnr": 20.0}
    assert mean_and_error("x", [2.0]) == {"x": 2.0}


def test_several_samples_of_an_image_are_one_number_of_it(tmp_path):
    """Else images with more samples would weigh more, and the error would be too small: samples of
    one image are alike."""
    of_image = {7: [10.0, 12.0, 14.0], 3: [30.0], 11: [20.0, 22.0]}
    rows = [
        row(Key(HEUN, image, sample), psnr=value)
        for image, values in of_image.items()
        for sample, value in enumerate(values)
    ]
    entry = kept(tmp_path, rows).entries[Way(HEUN)]
    means = np.array([np.mean(values) for values in of_image.values()])
    assert entry.images == 3
    assert entry.numbers["psnr"] == pytest.approx(means.mean())
    assert entry.numbers["psnr_se"] == pytest.approx(means.std(ddof=1) / math.sqrt(3))


def test_single_samples_and_what_they_come_to_together_are_two_ways(tmp_path):
    rows = [
        row(Key(HEUN, i, sample), psnr=value)
        for i in IMAGES
        for sample, value in ((0, 20.0), (1, 22.0), (-2, 24.0))
    ]
    summary = kept(tmp_path, rows)
    assert set(summary.entries) == {Way(HEUN), Way(HEUN, 2)}
    assert summary.entries[Way(HEUN)].numbers["psnr"] == 21
    assert summary.entries[Way(HEUN, 2)].numbers["psnr"] == 24


def test_seconds_are_those_of_an_answer_and_a_fill_has_none(tmp_path):
    rows = [row(Key(MEAN, i, 0), psnr=20.0, seconds=0.5 * n) for n, i in enumerate(IMAGES)]
    rows += [row(Key(LINEAR, i, 0), psnr=20.0, seconds=3.0) for i in IMAGES]
    summary = kept(tmp_path, rows)
    assert summary.entries[Way(MEAN)].numbers["seconds"] == pytest.approx(0.75)
    assert "seconds" not in summary.entries[Way(LINEAR)].numbers


# --- Failed rows --------------------------------------------------------------------------------


def test_failed_rows_are_counted_and_in_no_number(tmp_path):
    rows = [row(Key(MEAN, i, 0), psnr=20.0 + n) for n, i in enumerate(IMAGES)]
    rows[1] = row(Key(MEAN, IMAGES[1], 0), "OSError: gone", psnr=1e6)
    rows[2] = row(Key(MEAN, IMAGES[2], 0), "OSError: gone")
    entry = kept(tmp_path, rows).entries[Way(MEAN)]
    assert (entry.images, entry.failed) == (2, 2)
    assert entry.numbers["psnr"] == 21.5


def test_a_way_all_of_whose_rows_failed_is_told(tmp_path):
    summary = kept(tmp_path, [row(Key(MEAN, i, 0), "OSError: gone") for i in IMAGES])
    entry = summary.entries[Way(MEAN)]
    assert (entry.images, entry.failed, entry.numbers) == (0, len(IMAGES), {})
    assert entry.json()["failed"] == len(IMAGES) and entry.json()["sampler"] == "mean"


# --- Pairs --------------------------------------------------------------------------------------


def test_a_difference_is_taken_image_by_image(tmp_path):
    """Images differ by 6 dB among them and models by 0.5 +- 0.1: of unpaired means the error would
    be more than ten times as large."""
    count, draw = 40, np.random.default_rng(2)
    hard = 6 * draw.normal(size=count)
    ours, theirs = hard + 0.5 + 0.1 * draw.normal(size=count), hard
    other = replace(MEAN, checkpoint="B")
    rows = [row(Key(MEAN, i, 0), psnr=ours[i]) for i in range(count)]
    rows += [row(Key(other, i, 0), psnr=theirs[i]) for i in range(count)]
    summary = kept(tmp_path, rows)
    found = summary.difference(Way(MEAN), Way(other), "psnr")
    paired = ours - theirs
    assert found["psnr"] == pytest.approx(paired.mean())
    assert found["psnr_se"] == pytest.approx(paired.std(ddof=1) / math.sqrt(count))
    errors = [summary.entries[Way(cell)].numbers["psnr_se"] for cell in (MEAN, other)]
    assert math.hypot(*errors) > 10 * found["psnr_se"]
    back = summary.difference(Way(other), Way(MEAN), "psnr")
    assert back == pytest.approx({"psnr": -found["psnr"], "psnr_se": found["psnr_se"]})


def test_a_difference_is_of_images_that_both_have(tmp_path):
    other = replace(MEAN, checkpoint="B")
    rows = [row(Key(MEAN, i, 0), psnr=float(i)) for i in (1, 2, 3)]
    rows += [row(Key(other, i, 0), psnr=0.0) for i in (2, 3, 4)]
    rows.append(row(Key(other, 1, 0), "OSError: gone"))
    summary = kept(tmp_path, rows)
    assert summary.difference(Way(MEAN), Way(other), "psnr")["psnr"] == 2.5
    assert summary.difference(Way(MEAN), Way(other), "ssim") == {}


def test_ways_are_found_by_the_fields_of_their_cells(tmp_path):
    cells = [HEUN, MEAN, LINEAR, PART, replace(HEUN, nfe=10)]
    rows = [row(Key(cell, 7, 0), psnr=1.0) for cell in cells]
    rows.append(row(Key(HEUN, 7, -4), psnr=1.0))
    summary = kept(tmp_path, rows)
    assert set(summary.find(checkpoint="A", sampler="heun", asked=0, together=0)) == {
        Way(HEUN), Way(replace(HEUN, nfe=10)),
    }  # fmt: skip
    assert summary.find(together=4) == [Way(HEUN, 4)]
    assert set(summary.find()) == set(summary.entries)
    assert summary.find(resolution=64) == []


# --- Pooled over pixels -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A mean and a sample of real images by a real network."""
    data = small.staged(tmp_path_factory.mktemp("data"))
    images = EvalSet.read(ShardSet(str(data), "test"), LAYOUT, TEST)
    model = small.stirred(small.MODEL)
    mean = complete(model, images, SOLVERS["mean"])
    return images, mean, complete(model, images, SOLVERS["heun"], 2, around=mean)


def scored(cell: Cell, images: EvalSet, answer) -> list:
    """A row for each image, as an evaluation keeps them."""
    return [
        row(Key(cell, image, 0), scores=Scores().add(answer.image(i)).flat())
        for i, image in enumerate(images.ids.tolist())
    ]


def test_pooled_numbers_are_those_of_all_images_together(tmp_path, answers):
    images, mean, sample = answers
    summary = kept(tmp_path, scored(MEAN, images, mean) + scored(HEUN, images, sample))
    for cell, answer in ((MEAN, mean), (HEUN, sample)):
        found, whole = summary.entries[Way(cell)].numbers, Scores().add(answer).report()
        # These are columns of their own.
        columns = ("images", "psnr", "psnr_unknown", "ssim", "nfe", "seconds")
        expected = {k: v for k, v in whole.items() if k.removesuffix("_se") not in columns}
        assert found == pytest.approx(expected, rel=1e-9)
    assert {"speckle", "fair_speckle"} <= set(summary.entries[Way(MEAN)].numbers)
    sampled = summary.entries[Way(HEUN)].numbers
    assert {"spread", "coherence", "spread_1", "spread_axis_3"} <= set(sampled)
    of_images = [Scores().add(sample.image(i)).report()["spread"] for i in range(TEST)]
    assert abs(np.mean(of_images) - sampled["spread"]) > 1e-3, "no mean of images"


def test_of_a_part_of_an_image_only_what_is_of_single_pixels_is_kept(tmp_path, answers):
    images, _, sample = answers
    rows = [one | {"psnr_unknown": 20.0} for one in scored(PART, images, sample)]
    numbers = kept(tmp_path, rows).entries[Way(PART)].numbers
    whole = Scores().add(sample).report()
    wanted = {k: v for k, v in whole.items() if k.startswith(("spread", "coherence"))}
    own = {"psnr_unknown": 20.0, "psnr_unknown_se": 0.0}
    assert numbers == pytest.approx(wanted | own, rel=1e-9)
    assert "speckle" not in numbers and "fair_speckle" not in numbers


def test_reliability_is_pooled_over_images_in_its_own_bins(tmp_path):
    draw = torch.Generator().manual_seed(0)
    images = [
        (torch.rand(4, 6, 6, 3, generator=draw), torch.rand(6, 6, 3, generator=draw))
        for _ in IMAGES
    ]
    known, whole, rows = torch.zeros(6, 6, dtype=torch.bool), Reliability(), []
    for image, (samples, truth) in zip(IMAGES, images, strict=True):
        one = Reliability().add(samples, truth, known)
        whole = whole + one
        rows.append(row(Key(HEUN, image, -4), reliability=one.flat()))
    found = kept(tmp_path, rows).entries[Way(HEUN, 4)].reliability
    assert [count for *_, count in found] == [count for *_, count in whole.report()]
    assert np.array(found) == pytest.approx(np.array(whole.report()), rel=1e-12)


def test_the_spread_on_a_finer_grid_is_pooled_too(tmp_path):
    draw = torch.Generator().manual_seed(0)
    far, whole, rows = torch.tensor([1.0, 1.1, 1.4, 2.0, 2.1]), FineSpread(), []
    for image in IMAGES:
        drawn, real = torch.rand(2, 5, 3, generator=draw)
        one = FineSpread().add(drawn, far, real, far.round())
        whole = whole + one
        rows.append(row(Key(replace(HEUN, resolution=24), image, 0), fine=one.flat()))
    (entry,) = kept(tmp_path, rows).entries.values()
    assert entry.numbers == pytest.approx(whole.report(), rel=1e-12)
