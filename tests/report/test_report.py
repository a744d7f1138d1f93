import io
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mambaflow.disk import FullError
from mambaflow.evaluation.metrics import COLUMNS, SAMPLED, VALIDATED
from mambaflow.report.pictures import GAP, only_known, picture, to_png
from mambaflow.report.run_log import RunLog, StoredRunLog
from mambaflow.report.tables import Table, provenance, results_table
from mambaflow.storage import at


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def square(value):
    return np.full((8, 8, 3), value, np.uint8)


def logged(folder, start, steps, mark):
    """A run that goes on after `start`, logging each of `steps` with its own mark."""
    run = RunLog(folder, start)
    for step in steps:
        run.scalars(step, {"train/loss": mark + step})
        run.image(step, "validation", square(mark + step))
    run.close()


def test_a_run_that_goes_on_shows_every_step_once(tmp_path):
    logged(tmp_path, 0, range(1, 8), mark=0)
    logged(tmp_path, 4, range(5, 11), mark=100)
    expected = [(step, step if step <= 4 else 100 + step) for step in range(1, 11)]
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == expected
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == expected
    pictures = [
        (e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))[0, 0, 0])
        for e in found.Images("view/validation")
    ]
    assert pictures == expected


def test_a_run_lost_before_its_first_checkpoint_starts_clean(tmp_path):
    logged(tmp_path, 0, range(0, 5), mark=0)
    logged(tmp_path, 0, range(0, 3), mark=100)
    expected = [(step, 100 + step) for step in range(3)]
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == expected
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == expected


@pytest.mark.parametrize("torn", ['{"step": 5, "ti', "\0\0\0", '{"step": 5}garbage', "5"])
def test_a_line_torn_by_a_kill_is_dropped_with_a_warning(tmp_path, torn, caplog):
    logged(tmp_path, 0, range(1, 5), mark=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with caplog.at_level(logging.WARNING):
        logged(tmp_path, 4, [5], mark=0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert "torn last line" in caplog.text


def test_a_bad_line_in_the_middle_is_refused_and_nothing_is_lost(tmp_path):
    text = '{"step": 1}\nnonsense\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="metrics.jsonl:2"):
        RunLog(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_values_keep_their_full_precision_and_are_there_at_once(tmp_path):
    run = RunLog(tmp_path, 0)
    run.scalars(3, {"a": 1 / 3, "b": 1e-17})
    line = lines(tmp_path)[0]
    assert line["a"] == 1 / 3 and line["b"] == 1e-17 and line["step"] == 3 and line["time"] > 1e9
    run.close()
    run.close()


def test_settings_and_final_numbers_are_in_the_runs_own_folder_and_are_no_curves(tmp_path):
    run = RunLog(tmp_path, 0)
    run.scalars(7, {"train/loss": 1.0})
    run.line(7, {"test/psnr": 23.5})
    run.hparams({"arch": "v2", "model.d_model": 8, "none": None}, ["train/loss"])
    run.text(7, "test", "| method |\n| --- |\n| linear |")
    run.close()
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
    assert lines(tmp_path)[-1]["test/psnr"] == 23.5
    found = events(tmp_path)
    assert found.Tags()["scalars"] == ["train/loss"]
    settings = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.d_model" in settings and b"arch" in settings
    (text,) = found.Tensors("test/text_summary")
    assert text.step == 7 and b"| linear |" in text.tensor_proto.string_val[0]


def test_tensorboard_opens_on_the_loss_and_then_on_validation(tmp_path):
    run = RunLog(tmp_path, 0)
    curves = [f"val/{name}" for name in (*VALIDATED, *SAMPLED)]
    curves += ["train/loss", "train/lr", "train/input_stall", "law/length", "train/grad_norm"]
    for step in (1, 2):
        run.scalars(step, dict.fromkeys(curves, 0.5))
        run.image(step, "validation", square(step))
    run.close()
    assert lines(tmp_path)[-1].keys() == {"step", "time", *curves}, "as they are called"
    found = events(tmp_path).Tags()
    # TensorBoard unfolds the first two groups, in the order of their names.
    groups = {}
    for tag in sorted(found["scalars"] + found["images"]):
        groups.setdefault(tag.partition("/")[0], []).append(tag)
    assert list(groups) == [
        "train",
        "val",
        "val_spread",
        "val_texture",
        "view",
        "watch",
        "watch_law",
    ]
    assert groups["train"] == ["train/loss"] and groups["view"] == ["view/validation"]
    both = ("psnr", "psnr_unknown", "sample_psnr", "sample_psnr_unknown", "sample_ssim", "ssim")
    assert groups["val"] == [f"val/{name}" for name in both]
    assert not [tag for tag in found["scalars"] if tag.endswith(("_se", "_truth"))]


def test_nothing_temporary_is_left(tmp_path):
    logged(tmp_path, 0, [1], mark=0)
    logged(tmp_path, 1, [2], mark=0)
    names = [p.name for p in tmp_path.iterdir()]
    assert not [n for n in names if n.startswith(".")]


def test_a_png_holds_every_byte_of_its_image():
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_png(square(9))))), square(9))


def test_a_picture_shows_every_pixel_as_a_crisp_square():
    random = np.random.default_rng(0)
    small, large = (random.integers(0, 256, (2, n, n, 3), dtype=np.uint8) for n in (8, 16))
    sheet = picture({"truth": small, "twice as fine": large}, tile=90)
    tile = 96  # the next whole multiple of both
    assert sheet.shape[1] == GAP + 2 * (tile + GAP)
    top = sheet.shape[0] - 2 * (tile + GAP)
    for column, images in enumerate((small, large)):
        for row, image in enumerate(images):
            y, x = top + row * (tile + GAP), GAP + column * (tile + GAP)
            shown = sheet[y : y + tile, x : x + tile]
            scale = tile // image.shape[0]
            assert np.array_equal(shown, image.repeat(scale, 0).repeat(scale, 1))
    assert (sheet[0] == 255).all() and (sheet[:, 0] == 255).all()
    assert (sheet[: top - 1] < 128).any(), "titles"


def test_only_known_pixels_keep_their_colours():
    images = np.full((1, 4, 4, 3), 7, np.uint8)
    known = np.eye(4, dtype=bool)[None]
    shown = only_known(images, known)
    assert (shown[known] == 7).all() and len(np.unique(shown[~known])) == 1


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="same number of images"):
        picture({"a": np.zeros((1, 4, 4, 3), np.uint8), "b": np.zeros((2, 4, 4, 3), np.uint8)})


def test_a_table_is_markdown_with_aligned_columns_and_a_caption():
    rows = {
        "linear fill": {"psnr": 22.17, "psnr_se": 0.114, "ssim": 0.768, "images": 512},
        "posterior mean": {"psnr": 23.06, "psnr_se": 0.1, "ssim": 0.8, "ssim_se": 0.002, "nfe": 1},
    }
    table = str(results_table(rows, COLUMNS, provenance("python x.py", "cifar10", 3, images=512)))
    body, caption = table.split("\n\n")
    heading, rule, first, second = body.splitlines()
    assert [c.strip() for c in heading.strip("|").split("|")] == [
        "method", "PSNR full", "SSIM", "NFE"
    ]  # fmt: skip
    assert "22.17 ± 0.11" in first and "0.768 |" in first and "0.800 |" in second
    assert len({len(line) for line in (heading, rule, first, second)}) == 1
    assert "`python x.py`; data cifar10, seed 3, images 512, date " in caption


def test_numbers_of_another_day_say_which():
    assert provenance("x", "d", 0, date="2026-01-05").endswith(", seed 0, date 2026-01-05")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="must have 2 cells"):
        Table(["a", "b"], [["1"]])


def test_a_stored_log_closed_twice_is_closed_once(tmp_path):
    run = StoredRunLog(at(tmp_path / "run"), 0)
    run.scalars(1, {"a": 1.0})
    run.close()
    run.close()
    assert lines(tmp_path / "run")[-1]["a"] == 1.0


def test_a_line_that_a_full_disk_has_no_room_for_is_not_there_by_half(small_disk):
    run = RunLog(small_disk, 0)
    for step in range(10):
        run.scalars(step, {"train/loss": 0.5})
    room = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(room.f_bavail * room.f_frsize))
    logged = 10
    with pytest.raises(FullError, match=f"{small_disk}/metrics.jsonl: No space left") as caught:  # noqa: PT012
        while logged < 10_000:
            run.line(logged, {"train/loss": 0.5})
            logged += 1
    assert "--storage" in str(caught.value)
    assert [line["step"] for line in lines(small_disk)] == list(range(logged))
    (small_disk / "other").unlink()
    run.line(logged, {"train/loss": 0.5})
    assert lines(small_disk)[-1]["step"] == logged
    run.close()
