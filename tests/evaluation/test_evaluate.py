"""An evaluation: rows are functions of their keys, made once, and counted."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image, ImageOps

from mambaflow.config import RunConfig
from mambaflow.data.batches import Layout
from mambaflow.data.shard_reader import ShardSet
from mambaflow.data.sources import open_source
from mambaflow.data.stage_config import StageConfig
from mambaflow.data.staging import in_process as stage_here
from mambaflow.data.staging import stage
from mambaflow.evaluation import answers as answers_module
from mambaflow.evaluation.answers import Answerer
from mambaflow.evaluation.cells import Cell, EvaluateConfig, Key, Unit, order
from mambaflow.evaluation.complete import EvalSet, complete, fill
from mambaflow.evaluation.evaluate import Done, Progress, evaluate, in_process, status
from mambaflow.evaluation.metrics import Scores
from mambaflow.evaluation.plan import Plan, _meaning, named, plan
from mambaflow.evaluation.rows import Results, ResultsError, key_of
from mambaflow.flow.samplers import SOLVERS
from mambaflow.models.weights import CheckpointInfo, load_model
from mambaflow.storage import at
from mambaflow.training import checkpoint
from mambaflow.training.loop import TrainState

TAKES_TIME = {"seconds"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.staged(tmp_path_factory.mktemp("data"))


def saved(folder: Path, data: Path, seed: int, broken: bool = False) -> str:
    """A run with one checkpoint, of a model none of whose weights is zero."""
    config = small.run_config(data, folder.parent, folder.name, seed=seed)
    state = TrainState(config.model, config.train, small.CPU)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in state.ema.parameters():
            p.add_(0.05 * torch.randn_like(p))
            if broken:
                p.fill_(torch.nan)
    _save(state, folder, config)
    return str(folder)


def _save(state: TrainState, folder: Path, config: RunConfig) -> None:
    info = CheckpointInfo(step=1, config=config, scores={"val/psnr": 1.0})
    checkpoint.save(state, info, at(folder))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("runs") / "one", data, seed=1)


@pytest.fixture(scope="module")
def other(data, tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("runs") / "two", data, seed=2)


def config(data: Path, run: str, out: Path | str, **values) -> EvaluateConfig:
    defaults = {
        "checkpoint": (f"a={run}",), "data": str(data), "out": str(out), "limit": 6, "nfe": (2,),
        "at_nfe": 2, "lpips": "none", "fills": ("linear",), "pictures": 2, "ray": False,
    }  # fmt: skip
    return EvaluateConfig(**{**defaults, **values})


def evaluated(asked: EvaluateConfig, make=in_process, **settings) -> list[dict]:
    results = Results(at(asked.out))
    evaluate(plan(asked), results, make, **settings)
    return results.read().to_pylist()


def lasting(rows: list[dict]) -> dict[Key, dict]:
    """Of each row what is a function of its key."""
    return {key_of(r): {k: v for k, v in r.items() if k not in TAKES_TIME} for r in rows}


def test_rows_do_not_depend_on_how_many_there_are_nor_on_their_order(data, run, tmp_path):
    values = {
        "samplers": ("mean", "heun", "sde"), "samples": 2, "known_shares": (0.1,), "asked": (30,),
        "resolutions": (24,),
    }  # fmt: skip

    def backwards(job, out, units):
        yield from in_process(job, out, units[::-1])

    whole = lasting(evaluated(config(data, run, tmp_path / "whole", limit=16, **values), backwards))
    few = lasting(evaluated(config(data, run, tmp_path / "few", limit=3, **values)))
    assert len(few) == len(whole) * 3 // 16 and all(row["error"] == "" for row in few.values())
    pictures = {"picture", "deviation"}  # kept of the same first images in both
    assert {k: without(v, pictures) for k, v in few.items()} == {
        k: without(whole[k], pictures) for k in few
    }
    assert {k.image for k, v in few.items() if v["picture"]} <= {k.image for k in few}


def without(row: dict, names: set[str]) -> dict:
    return {k: v for k, v in row.items() if k not in names}


def test_a_row_holds_what_completing_that_image_comes_to(data, run, tmp_path):
    found = lasting(evaluated(config(data, run, tmp_path, samplers=("mean", "heun"))))
    model, _ = load_model(run)
    split = ShardSet(str(data), "test")
    layout = Layout.of(split.spec, model.config)
    rows = order(len(split))
    held = EvalSet.of_rows(split, layout, rows)  # 16 images: one group
    staged = EvalSet.read(split, layout, len(split))
    assert torch.equal(held.known[rows.argsort()], staged.known), "the masks are the staged ones"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = complete(model, held, SOLVERS["mean"])
    one = complete(model, held, SOLVERS["heun"], 1, around=best)
    torch.set_num_threads(threads)
    for name, answer in {"mean": best, "heun": one, "linear": fill("linear", held)}.items():
        cell = next(key.cell for key in found if key.cell.sampler == name)
        for i in range(6):
            row = found[Key(cell, int(held.ids[i]), 0)]
            alone = Scores().add(replace(answer.image(i), seconds=0.0))
            assert row["scores"] == pytest.approx(alone.flat(), nan_ok=True)
            report = alone.report()
            for number in ("psnr", "psnr_unknown", "ssim"):
                assert row[number] == report[number]
            error = (answer.prediction[i] - held.truth[i]).double()
            assert row["mse"] == pytest.approx(float(error.square().mean()))
            assert row["mae"] == pytest.approx(float(error.abs().mean()))


def test_what_is_added_is_made_and_nothing_else(data, run, other, tmp_path):
    made: list[Unit] = []

    def counted(job, out, units):
        made.extend(units)
        yield from in_process(job, out, units)

    first = config(data, run, tmp_path, samplers=("mean",))
    before = lasting(evaluated(first, counted))
    assert sum(len(unit.keys) for unit in made) == len(before) == 12
    made.clear()
    evaluated(first, counted)
    assert made == []
    evaluated(replace(first, samplers=("mean", "heun"), samples=2), counted)
    assert {unit.cell.sampler for unit in made} == {"heun"}
    assert {unit.samples for unit in made} == {(0, 1, -2)}
    made.clear()
    evaluated(replace(first, limit=8), counted)
    assert {len(unit.images) for unit in made} == {2}, "two more images of each cell"
    made.clear()
    after = evaluated(replace(first, checkpoint=(f"a={run}", f"b={other}")), counted)
    assert {unit.cell.checkpoint for unit in made} == {"b"}
    kept = lasting(after)
    assert before.items() <= kept.items()


def test_more_samples_keep_the_first_and_add_their_mean(data, run, tmp_path):
    values = {"samplers": ("heun",), "fills": (), "limit": 2}
    two = lasting(evaluated(config(data, run, tmp_path / "two", samples=2, **values)))
    three = lasting(evaluated(config(data, run, tmp_path / "three", samples=3, **values)))
    assert {k.sample for k in two} == {0, 1, -2} and {k.sample for k in three} == {0, 1, 2, -3}
    for key in (k for k in two if k.sample >= 0):
        assert three[key] == two[key]
    (cell,) = {k.cell for k in three}
    image = min(k.image for k in three)
    numbers = [three[Key(cell, image, s)]["psnr"] for s in range(3)]
    assert len(set(numbers)) == 3, "samples differ"
    assert three[Key(cell, image, -3)]["psnr"] > np.mean(numbers), "their mean errs less"
    assert len(three[Key(cell, image, -3)]["deviation"]) == small.SIZE**2


def test_masks_of_two_shares_are_nested(data):
    split = ShardSet(str(data), "test")
    few, many = (
        EvalSet.of_rows(split, Layout(small.SIZE, k, 28), np.arange(4)).known for k in (10, 70)
    )
    assert torch.equal(many[:, :10], few)


def test_sixths_are_those_of_the_whole_split_whatever_the_limit(data, run, tmp_path):
    a = plan(config(data, run, tmp_path, limit=2)).job.edges
    b = plan(config(data, run, tmp_path, limit=16)).job.edges
    assert a == b and len(a[28]) == 5


def test_rows_that_fail_are_kept_counted_and_done_again_only_when_asked(data, tmp_path):
    broken = saved(tmp_path / "broken", data, seed=1, broken=True)
    asked = config(data, broken, tmp_path / "out", samplers=("mean", "heun"))
    rows = evaluated(asked)
    failed = [row for row in rows if row["error"]]
    assert len(rows) == 18 and len(failed) == 12
    assert all("not finite" in row["error"] or "mean square nan" in row["error"] for row in failed)
    assert all(row["psnr"] is None for row in failed)
    found = status(Results(at(asked.out)))
    assert (found.asked, found.done, found.failed, found.whole) == (18, 6, 12, True)
    assert str(found) == "18 rows asked = 6 done + 12 failed, all unique"
    made: list[Unit] = []

    def counted(job, out, units):
        made.extend(units)
        yield from in_process(job, out, units)

    evaluated(asked, counted)
    assert made == []
    evaluated(asked, counted, retry_errors=True)
    assert {unit.cell.sampler for unit in made} == {"mean", "heun"}


def test_a_row_that_failed_once_is_replaced_by_its_answer(data, run, tmp_path, monkeypatch):
    asked = config(data, run, tmp_path, samplers=("mean",), fills=())
    with monkeypatch.context() as patch:

        def out_of_memory(*_, **__):
            raise RuntimeError("no memory left\nand a page about it")

        patch.setattr(answers_module, "complete", out_of_memory)
        rows = evaluated(asked)
        assert {row["error"] for row in rows} == {"RuntimeError: no memory left"}
    rows = evaluated(asked, retry_errors=True)
    assert {row["error"] for row in rows} == {""} and len(rows) == 6


def test_other_weights_under_a_name_are_refused_and_nothing_is_made(data, run, other, tmp_path):
    asked = config(data, run, tmp_path, samplers=("mean",))
    evaluated(asked)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.parquet")}
    with pytest.raises(ResultsError, match=r"weights\.a: .* -> .*use another --out"):
        evaluated(replace(asked, checkpoint=(f"a={other}",)))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.parquet")} == before


def test_other_masks_are_refused(data, run, tmp_path):
    evaluated(config(data, run, tmp_path / "out", samplers=("mean",)))
    again = small.staged(tmp_path / "again", mask_seed=7)
    with pytest.raises(ResultsError, match=r"data\.mask seed: 42 -> 7"):
        evaluated(config(again, run, tmp_path / "out", samplers=("mean",)))


def test_a_hash_of_code_hears_what_it_does_and_not_how_it_is_told(tmp_path):
    file = tmp_path / "a.py"

    def meaning(text: str) -> str:
        file.write_text(text)
        return _meaning(file)

    plain = meaning("def f(x):\n    return x + 1\n")
    assert plain == meaning(
        '"""A room."""\n\ndef f(x):\n    """More."""\n    # why\n    return (x + 1)\n'
    )
    assert plain != meaning("def f(x):\n    return x + 2\n")


def test_checkpoints_are_called_after_their_runs_or_as_they_are_named(tmp_path):
    assert named(["runs/x", "y=runs/x"]) == {"x": "runs/x", "y": "runs/x"}
    assert named(["s3://b/runs/x/step_0000004"]) == {"x step_0000004": "s3://b/runs/x/step_0000004"}
    assert named(["runs/a=b"]) == {"a=b": "runs/a=b"}, "an address may hold an equals sign"
    for bad in (["runs/x", "other/x"], ["classical=runs/x"], ["=runs/x"]):
        with pytest.raises(ValueError, match="is taken; use NAME="):
            named(bad)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, Path]:
    """Images of 12 pixels reduced to 6, and the same at 12: what a reduced answer is scored by."""
    folder = tmp_path_factory.mktemp("large")
    whole = small.staged(folder)
    return small.staged(folder / "half", size=6, reduce=2), whole


def test_an_answer_of_the_real_size_is_scored_against_the_real_image(large, run, tmp_path):
    half, whole = large
    asked = config(half, run, tmp_path, samplers=("mean",), fills=(), resolutions=(12,),
                   truth=str(whole), limit=3)  # fmt: skip
    rows = [r for r in evaluated(asked) if r["resolution"] == 12]
    truth = ShardSet(str(whole), "test")
    images = dict(zip(truth.rows(np.arange(16)).ids.tolist(), truth.rows(np.arange(16)).images,
                      strict=True))  # fmt: skip
    model, _ = load_model(run)
    for row in rows:
        assert row["error"] == "" and row["psnr"] is not None and row["rival_psnr"] is not None
        answer = np.asarray(_png(row["picture"]), np.float64) if row["picture"] else None
        if answer is not None:
            real = images[row["image"]].reshape(12, 12, 3).astype(np.float64)
            db = -10 * np.log10(np.mean(((answer - real) / 255) ** 2))
            assert row["psnr"] == pytest.approx(db, abs=0.05), "but for rounding to bytes"


def _png(data: bytes):
    return Image.open(io.BytesIO(data))


def test_a_checkpoint_under_the_name_of_another_architecture_is_said(data, run, tmp_path, caplog):
    plan(config(data, run, tmp_path, checkpoint=(f"V1={run}", f"v2={run}")))
    assert "V1 is of architecture v2: exchanged?" in caplog.text
    assert "v2 is of architecture" not in caplog.text


def test_a_truth_of_other_images_is_refused(large, run, tmp_path):
    half, whole = large
    with pytest.raises(ValueError, match="must be a whole multiple of data's size"):
        plan(config(half, run, tmp_path, truth=str(half)))
    for odd in ((), (24,)):
        with pytest.raises(ValueError, match="no answer is: nothing would .* --resolutions 12, or"):
            plan(config(half, run, tmp_path, truth=str(whole), resolutions=odd))
    flipped = tmp_path / "flipped"
    images = small.images(flipped / "images")
    for path in images.rglob("*.png"):
        ImageOps.mirror(Image.open(path)).save(path)
    source = open_source(str(images))
    stage(StageConfig(source=str(images), out=str(flipped / "shards"), size=12, validation=8,
                      ray=False), source, stage_here(source))  # fmt: skip
    with pytest.raises(ValueError, match="does not hold the images of data"):
        plan(config(half, run, tmp_path, truth=str(flipped / "shards"), resolutions=(12,)))


def test_the_time_left_is_told_once_every_cell_was_timed():
    a, b = (Cell("a", s, "", 2, 12, 28, 0) for s in ("heun", "ddim"))
    units = [Unit(a, 0, (1, 2), (0,)), Unit(b, 0, (1, 2), (0,)), Unit(a, 1, (3, 4), (0,))]
    progress = Progress.of(units, workers=2)
    assert progress.rows == 6 and progress.seconds_left is None
    progress.add(Done(units[0], 0, 4.0))
    assert progress.seconds_left is None
    progress.add(Done(units[1], 1, 9.0))
    assert progress.seconds_left == pytest.approx(2 * 2.0 / 2) and progress.failed == 1


def test_who_looks_from_elsewhere_sees_all_that_was_ever_asked(data, run, tmp_path):
    asked = config(data, run, tmp_path, samplers=("mean",), limit=2)
    results = Results(at(tmp_path))

    def nothing(job, out, units) -> Iterator:
        yield from ()

    evaluate(plan(asked), results, nothing)
    assert str(status(results)) == "4 rows asked: 0 done, 0 failed, 4 missing"
    assert not status(results).whole
    evaluated(asked)
    evaluate(plan(replace(asked, samplers=("mean", "heun"), limit=4)), results, nothing)
    found = status(results)
    assert (found.asked, found.done) == (12, 4)
    assert json.loads((tmp_path / "manifest.json").read_text())["lpips"] == "none"


def test_an_actor_keeps_only_what_it_was_asked_for(data, run, tmp_path):
    planned: Plan = plan(config(data, run, tmp_path, samplers=("mean",), fills=()))
    answerer = Answerer(planned.job)
    (whole,) = planned.units(())
    part = replace(whole, images=whole.images[2:3])
    (row,) = answerer.rows(part)
    by_key = dict(zip(whole.keys, answerer.rows(whole), strict=True))
    mine = by_key[part.keys[0]]
    assert without(row, TAKES_TIME) == without(mine, TAKES_TIME)
