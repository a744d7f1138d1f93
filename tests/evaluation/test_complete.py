"""Held-out images: what is given is given exactly, and a score depends on the answer alone."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from small import LAYOUT, MODEL, TEST
from torch import Tensor, nn

from mambaflow.config import RunConfig
from mambaflow.data.batches import Layout, PixelBatch
from mambaflow.data.shard_reader import ShardSet
from mambaflow.data.sources import open_source
from mambaflow.data.stage_config import StageConfig
from mambaflow.data.staging import in_process, stage
from mambaflow.evaluation import complete as complete_module
from mambaflow.evaluation import final_report as report_module
from mambaflow.evaluation.activity import activity, sextile_edges, sextiles
from mambaflow.evaluation.baselines import FILLS
from mambaflow.evaluation.cells import order
from mambaflow.evaluation.complete import EvalSet, complete, fill, score
from mambaflow.evaluation.final_report import MEAN, QUICK_FILLS, SAMPLE, final_report, validate
from mambaflow.evaluation.metrics import VALIDATED, Scores
from mambaflow.evaluation.quality import PERFECT_DB
from mambaflow.flow.samplers import SOLVERS, Solver, mean
from mambaflow.models.velocity_field import ConditionedField, VelocityField


class Oracle(VelocityField):
    """The velocity to the true colours of the batch, plus an error."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__(MODEL)
        self.error = error

    def condition(self, batch: PixelBatch):
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return (batch.query_rgb + self.error - x) / (1 - t[:, None, None])

        return ConditionedField(velocity, None, lambda normal, _: normal(*batch.query_rgb.shape))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.staged(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def eval_set(data) -> EvalSet:
    return EvalSet.read(ShardSet(str(data), "test"), LAYOUT, TEST)


@pytest.fixture(scope="module")
def model() -> VelocityField:
    torch.manual_seed(3)
    field = VelocityField(MODEL)
    nn.init.normal_(field.head.weight, std=0.3)  # so that x and t matter
    return field.eval()


BEST, HEUN = SOLVERS["mean"], SOLVERS["heun"]


def scored(
    model: VelocityField, eval_set: EvalSet, solver: Solver, steps: int = 1
) -> dict[str, float]:
    """What a solver's answers are worth."""
    answers = lambda chunk: {"it": complete(model, chunk, solver, steps)}  # noqa: E731
    return score(["it"], answers, eval_set)["it"].report()


def without_time(scores: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in scores.items() if key != "seconds"}


class Recorded:
    """One of several workers that work one after the other; `sent` is what each contributed."""

    def __init__(self, rank: int, size: int, sent: list[Tensor]) -> None:
        self.rank, self.size, self.sent = rank, size, sent

    def all_reduce(self, values: Tensor) -> Tensor:
        self.sent.append(values)
        return torch.stack(self.sent).sum(0)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_workers_score_bitwise_as_one(model, eval_set, monkeypatch, size):
    monkeypatch.setattr(complete_module, "CHUNK", 5)  # of 16: four chunks, fewer than 7 workers
    answers = []

    def answer(chunk: EvalSet):
        best = complete(model, chunk, BEST)
        one = complete(model, chunk, HEUN, 2, around=best)
        answers.append(len(chunk))
        return {MEAN: best, SAMPLE: one}

    alone = {k: v.report() for k, v in score([MEAN, SAMPLE], answer, eval_set).items()}
    answers.clear()
    sent: list[Tensor] = []
    for rank in range(size):
        together = score([MEAN, SAMPLE], answer, eval_set, Recorded(rank, size, sent))
    assert sorted(answers) == [1, 5, 5, 5], "every chunk by one worker"
    for name in (MEAN, SAMPLE):
        assert without_time(together[name].report()) == without_time(alone[name])
    assert "spread" in alone[SAMPLE] and "spread" not in alone[MEAN]
    assert {"fair_speckle", "spread_1", "spread_6", "spread_axis_3"} <= set(alone[SAMPLE])


def test_sextiles_are_of_the_set_that_was_read_and_a_part_keeps_its_edges(data, eval_set):
    images, known = eval_set.images.numpy(), eval_set.known.numpy()
    active = activity(images, known)
    expected = torch.from_numpy(sextiles(active, sextile_edges(active, known)))
    assert torch.equal(eval_set.sextile, expected)
    sizes = eval_set.sextile[~eval_set.is_known].bincount(minlength=6)
    assert sizes.min() > 0.9 * sizes.float().mean()
    parts = [eval_set[first : first + 5].sextile for first in range(0, TEST, 5)]
    assert torch.equal(torch.cat(parts), expected)
    fewer = EvalSet.read(ShardSet(str(data), "test"), LAYOUT, 5)
    assert not torch.equal(fewer.sextile, expected[:5]), "as a set of its own"


def test_the_same_images_and_masks_are_held_out_each_time(data, eval_set):
    again = EvalSet.read(ShardSet(str(data), "test"), LAYOUT, TEST)
    fewer = EvalSet.read(ShardSet(str(data), "test"), LAYOUT, 5)
    more = EvalSet.read(ShardSet(str(data), "test"), LAYOUT, 10**6)
    assert again.mask_hash == eval_set.mask_hash == more.mask_hash != fewer.mask_hash
    assert len(more) == TEST and torch.equal(more.ids, eval_set.ids)
    of_them = torch.tensor([eval_set.ids.tolist().index(i) for i in fewer.ids.tolist()])
    assert torch.equal(fewer.known, eval_set.known[of_them])
    assert torch.equal(fewer.images, eval_set.images[of_them])
    assert (eval_set.is_known.sum((1, 2)) == LAYOUT.known).all()


def test_a_part_of_the_images_is_drawn_from_all_and_begins_with_a_smaller_part(data, eval_set):
    split = ShardSet(str(data), "test")
    drawn = [EvalSet.read(split, LAYOUT, count).ids.tolist() for count in (3, 6, TEST - 1)]
    assert drawn[0] == drawn[1][:3] and drawn[1] == drawn[2][:6]
    assert len(set(drawn[2])) == TEST - 1 and drawn[1] != sorted(drawn[1])
    assert max(drawn[1]) >= TEST // 2, "not the first of them"
    assert drawn[2] == order(TEST)[: TEST - 1].tolist(), "as an evaluation takes them"
    assert eval_set.some(6).ids.tolist() == drawn[1]
    assert eval_set.some(TEST).ids.tolist() == eval_set.ids.tolist()


def test_masks_of_validation_are_another_stream_than_those_of_the_test(data, eval_set):
    other = EvalSet.read(ShardSet(str(data), "validation"), LAYOUT, small.VALIDATION)
    mine = set(map(tuple, eval_set.known.tolist()))
    assert not mine & set(map(tuple, other.known.tolist()))


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_known_pixels_are_copied_exactly_whatever_a_solver_says(eval_set, low):
    whole = replace(eval_set, layout=replace(LAYOUT, rgb_low=low))
    nonsense = torch.full((TEST, whole.layout.size**2 - LAYOUT.known, 3), 0.123)
    _, others = whole.batch()
    images = whole.assemble(others, nonsense)
    known = whole.is_known
    assert torch.equal(images[known], whole.truth[known])
    want = 0.123 if low == 0 else (0.123 + 1) / 2
    torch.testing.assert_close(images[~known], torch.full_like(images[~known], want))


def test_all_pixels_are_known_or_asked_and_none_is_both(eval_set):
    batch, others = eval_set.batch()
    pixels = torch.cat((eval_set.known, others), 1).sort(1).values
    assert torch.equal(pixels, torch.arange(small.SIZE**2).expand(TEST, -1))
    assert batch.query_xy.shape[1] == others.shape[1] == small.SIZE**2 - LAYOUT.known


# Their last step goes to where the velocity points; that of the exponential sampler is exact where
# the noise has the residual's law, and here nothing is left over.
STRAIGHT = {name: solver for name, solver in SOLVERS.items() if name != "exponential"}


@pytest.mark.parametrize("solver", STRAIGHT.values(), ids=STRAIGHT)
def test_a_perfect_velocity_scores_100_dB_and_1_by_every_solver(eval_set, solver):
    scores = scored(Oracle(), eval_set, solver, 3)
    assert scores["psnr"] == scores["psnr_unknown"] == PERFECT_DB
    assert scores["ssim"] == pytest.approx(1, abs=1e-6)
    assert scores["speckle"] == pytest.approx(0, abs=1e-6)


def test_a_constant_error_scores_what_arithmetic_says(eval_set):
    middle = replace(eval_set, images=(eval_set.images // 2 + 64))  # nothing is clipped
    scores = scored(Oracle(0.02), middle, BEST)
    assert scores["psnr_unknown"] == pytest.approx(40, abs=1e-3)  # 0.02 of 2 is 0.01 of 1
    unknown = 1 - LAYOUT.known / small.SIZE**2
    assert scores["psnr"] == pytest.approx(40 - 10 * torch.tensor(unknown).log10().item(), abs=1e-3)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_answers_and_scores_do_not_depend_on_the_chunk(model, eval_set, monkeypatch, solver):
    found = []
    for chunk in (1, 5, 64):
        monkeypatch.setattr(complete_module, "CHUNK", chunk)
        found.append(scored(model, eval_set, solver, 2))
    for other in found[1:]:
        assert other["nfe"] == found[0]["nfe"] and other["images"] == TEST
        assert without_time(other) == pytest.approx(without_time(found[0]), abs=1e-3)


def test_an_image_is_completed_the_same_beside_others_and_alone(model, eval_set):
    together = complete(model, eval_set, HEUN, 2).prediction
    alone = complete(model, eval_set[7:8], HEUN, 2).prediction
    torch.testing.assert_close(alone[0], together[7], rtol=0, atol=2e-5)
    assert not torch.allclose(together[6], together[7])


def test_the_posterior_mean_is_the_mean_sampler_whatever_the_noise(model, eval_set):
    best = complete(model, eval_set, BEST)

    def from_other_noise(velocity, noise, times, draw):
        return mean(velocity, 3 * noise + 1)

    other = complete(model, eval_set, replace(BEST, function=from_other_noise))
    assert best.calls == 1
    torch.testing.assert_close(best.prediction, other.prediction, rtol=0, atol=1e-5)
    sample = complete(model, eval_set, HEUN, 4)
    assert sample.calls == 8  # Heun: two calls a step, as counted
    assert (sample.prediction - best.prediction).abs().max() > 0.05


def test_spread_is_measured_before_clipping_and_psnr_after(eval_set):
    """Truth black or white, the mean 0.1 inside, a sample three times as far from it as the truth:
    all of it out of range, where clipping would make it the truth itself."""
    extreme = replace(eval_set, images=255 * (eval_set.images > 127).to(torch.uint8))
    _, others = extreme.batch()
    truth = extreme.truth.flatten(1, 2).gather(1, others[..., None].expand(-1, -1, 3)) * 2 - 1

    def answered(rgb: Tensor, **around):
        solver = replace(BEST, function=lambda velocity, noise, times, draw: rgb)
        return complete(Oracle(), extreme, solver, **around)

    best = answered(0.8 * truth)
    one = answered(1.4 * truth, around=best)
    known = extreme.is_known
    for found, error in ((best.answer, 0.1), (one.answer, 0.2), (one.mean, 0.1)):
        far = (found - extreme.truth)[~known].abs()
        torch.testing.assert_close(far, torch.full_like(far, error))
        assert torch.equal(found[known], extreme.truth[known])
    report = Scores().add(one).report()
    clipped = Scores().add(replace(one, unclipped=None)).report()
    keys = [key for key in report if key.startswith("spread")]
    assert len(keys) == 1 + 6 + 3
    assert [report[key] for key in keys] == pytest.approx([9] * 10, rel=1e-5)
    assert [clipped[key] for key in keys] == pytest.approx([1] * 10, rel=1e-5)
    assert report["psnr"] == clipped["psnr"] == PERFECT_DB


def test_validation_leaves_the_model_and_the_global_generator_as_they_were(model, eval_set):
    before, weights = torch.get_rng_state(), model.head.weight.clone()
    scores, picture = validate(model, eval_set, small.FIT)
    again, _ = validate(model, eval_set, small.FIT)
    assert scores == again
    mean = {"psnr", "psnr_se", "psnr_unknown", "ssim", "speckle"}
    drawn = {"sample_psnr", "sample_psnr_unknown", "sample_ssim", "sample_speckle", "fair_speckle",
             "spread", "coherence", "coherence_truth"}  # fmt: skip
    spreads = {f"spread_{n}" for n in range(1, 7)} | {f"spread_axis_{n}" for n in range(1, 4)}
    assert set(scores) == {f"val/{key}" for key in mean | drawn | spreads}
    assert all(math.isfinite(value) for value in scores.values())
    assert picture.dtype.name == "uint8" and picture.ndim == 3
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(weights, model.head.weight)


def test_a_curve_is_of_the_mean_or_of_the_sample_and_its_name_says_which(model, eval_set):
    scores, _ = validate(model, eval_set, small.FIT)
    best, one = scored(model, eval_set, BEST), scored(model, eval_set, HEUN)
    for key in ("psnr", "psnr_unknown", "ssim", "speckle"):
        assert scores[f"val/{key}"] == best[key] != one[key] == scores[f"val/sample_{key}"]
    assert scores["val/fair_speckle"] == one["fair_speckle"] != best["fair_speckle"]


def test_validation_draws_no_more_samples_than_its_limit_and_the_mean_is_of_all(
    model, eval_set, monkeypatch
):
    everything, _ = validate(model, eval_set, small.FIT)
    monkeypatch.setattr(report_module, "SAMPLED_IMAGES", 3)
    first, _ = validate(model, eval_set, small.FIT)
    of_three, _ = validate(model, eval_set.some(3), small.FIT)
    for name, value in first.items():
        of_mean = name.removeprefix("val/") in VALIDATED
        assert value == (everything if of_mean else of_three)[name], name


@pytest.mark.parametrize("size", [2, 5])
def test_any_number_of_workers_validate_bitwise_as_one(model, eval_set, monkeypatch, size):
    monkeypatch.setattr(complete_module, "CHUNK", 3)
    monkeypatch.setattr(report_module, "SAMPLED_IMAGES", 8)
    alone, _ = validate(model, eval_set, small.FIT)
    means, samples = [], []

    class Worker(Recorded):
        """Of all images the mean is scored first, in six chunks; then the sample, in three."""

        def all_reduce(self, values: Tensor) -> Tensor:
            self.sent = means if len(values) == 6 else samples
            return super().all_reduce(values)

    for rank in range(size):
        together, picture = validate(model, eval_set, small.FIT, Worker(rank, size, []))
        assert (picture is None) == (rank > 0)
    assert together == alone
    assert [bool(sent.any()) for sent in samples] == [rank < 3 for rank in range(size)]


def test_a_number_that_is_none_is_in_no_curve(model, eval_set, monkeypatch):
    """Of black images that everybody knows to be black there is no spread, nor a coherence."""
    black = replace(eval_set, images=torch.zeros_like(eval_set.images))
    knowing = replace(BEST, function=lambda velocity, noise, times, draw: -torch.ones_like(noise))
    for solver in ("MEAN_SOLVER", "SAMPLE_SOLVER"):
        monkeypatch.setattr(report_module, solver, knowing)
    scores, _ = validate(model, black, small.FIT)
    assert "val/spread" not in scores and "val/coherence" not in scores
    assert all(math.isfinite(value) for value in scores.values()) and scores["val/psnr"] == 100
    report = final_report(model, black, RunConfig(model=MODEL, train=small.FIT), 1, 1)
    assert all(math.isfinite(x) for row in report.rows.values() for x in row.values())
    assert "nan" not in report.table.lower() and "NaN" not in report.json


def test_the_report_says_all_that_its_numbers_depend_on(model, eval_set, data):
    config = RunConfig(
        data=str(data), model=MODEL, train=replace(small.FIT, seed=5, masks="fresh"),
        command="python jobs/train.py --seed 5",
    )  # fmt: skip
    report = final_report(model, eval_set, config, step=18, trained_steps=20)
    heading = report.table.splitlines()[0]
    for column in ("PSNR full", "PSNR unknown", "SSIM", "speckle", "fair speckle",
                   "spread", "coherence", "NFE"):  # fmt: skip
        assert column in heading
    rows = [line.split("|")[1].strip() for line in report.table.splitlines()[2:7]]
    assert rows == [*QUICK_FILLS, MEAN, SAMPLE]
    facts = ("`python jobs/train.py --seed 5`", f"data {data}", "seed 5", f"images {TEST}",
             f"masks {eval_set.mask_hash}", "training masks fresh", "checkpoint step 18",
             f"date {time.strftime('%Y-%m-%d')}")  # fmt: skip
    for fact in facts:
        assert fact in report.table, fact
    spreads = report.table.split("\n\n")[2].splitlines()
    for column in ("sixth 1", "sixth 6", "axis 1", "axis 3", "truth's coherence"):
        assert column in spreads[0] and column not in heading
    assert len(spreads) == 3 and spreads[2].startswith(f"| {SAMPLE} |")
    assert report.curves["test/spread"] == report.rows[SAMPLE]["spread"]
    assert report.curves["test/psnr"] == report.rows[MEAN]["psnr"]
    about = json.loads(report.json)
    assert about["trained_steps"] == 20 and about["masks"] == eval_set.mask_hash
    assert about["rows"]["posterior mean"]["nfe"] == 1
    want = scored(model, eval_set, BEST)["psnr"]
    assert about["rows"]["posterior mean"]["psnr"] == want


def test_an_empty_test_split_has_no_report(model, eval_set):
    with pytest.raises(ValueError, match="the test split is empty; stage the data with a test"):
        final_report(model, eval_set[:0], RunConfig(), 1, 1)


def test_shards_without_whole_images_cannot_be_held_out(tmp_path):
    data = small.staged(tmp_path, full_images=False)
    with pytest.raises(ValueError, match="held-out shards must hold whole images; stage the data"):
        EvalSet.read(ShardSet(str(data), "train"), LAYOUT, 4)


# Of the first CIFAR-10 test images with 204 known pixels: how many images; PSNR in dB of all pixels
# and of the unknown ones; SSIM.
PROTOCOL = {
    "nearest": (512, 20.34, 19.38, 0.710),
    "linear": (512, 22.17, 21.20, 0.768),
    "thin-plate": (512, 22.91, 21.94, 0.801),
    "biharmonic": (128, 22.85, 21.88, 0.797),
}


@pytest.fixture(scope="module")
def protocol_set(real_cifar) -> EvalSet:
    """The images and masks of the protocol: of numpy's generator with seed 42, image by image."""
    items = open_source(str(real_cifar)).items("test", np.arange(512))
    images = np.stack([item.pixels for item in items])
    draw = np.random.RandomState(42)
    known = np.stack([draw.permutation(32 * 32)[:204] for _ in images])
    active = activity(images, known)
    sixths = sextiles(active, sextile_edges(active, known))
    held = (images, known, np.arange(512), sixths)
    return EvalSet(Layout(32, 204, 204), *map(torch.from_numpy, held))


@pytest.mark.realdata
@pytest.mark.parametrize("name", FILLS)
def test_classical_fills_of_real_photographs_score_as_the_protocol_says(protocol_set, name):
    count, psnr, unknown, ssim = PROTOCOL[name]
    found = Scores().add(fill(name, protocol_set[:count])).report()
    assert found["images"] == count
    assert found["psnr"] == pytest.approx(psnr, abs=0.05)
    assert found["psnr_unknown"] == pytest.approx(unknown, abs=0.05)
    # Two known pixels may be equally near, and which of them is taken is the search's own affair.
    assert found["ssim"] == pytest.approx(ssim, abs=0.002)


@pytest.mark.realdata
def test_classical_fills_of_real_photographs_come_in_their_known_order(tmp_path, real_cifar):
    spec = str(real_cifar)
    config = StageConfig(source=spec, out=str(tmp_path), limit=16, validation=16, ray=False)
    source = open_source(spec)
    stage(config, source, in_process(source))
    photographs = EvalSet.read(ShardSet(str(tmp_path), "test"), Layout(32, 204, 204), 128)
    assert len(photographs) == 128
    sums = score(
        list(QUICK_FILLS),
        lambda chunk: {name: fill(name, chunk) for name in QUICK_FILLS},
        photographs,
    )
    scores = {name: found.report() for name, found in sums.items()}
    found = {name: of["psnr"] for name, of in scores.items()}
    assert found["nearest"] < found["linear"] < found["thin-plate"]
    # 128 other draws of image and mask: each level within 4 of its standard errors, and the
    # differences, which share images and masks, much closer.
    for name in QUICK_FILLS:
        assert found[name] == pytest.approx(PROTOCOL[name][1], abs=4 * scores[name]["psnr_se"])
    assert found["linear"] - found["nearest"] == pytest.approx(1.83, abs=0.3)
    assert found["thin-plate"] - found["linear"] == pytest.approx(0.74, abs=0.3)
