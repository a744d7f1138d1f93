"""Rows of an evaluation in storage: whole, once, and of one fingerprint."""

import json
import math

import pytest

from mambaflow.evaluation.cells import Cell, Key, Unit
from mambaflow.evaluation.rows import MANIFEST, Results, ResultsError, key_of, row
from mambaflow.storage import at

CELL = Cell("a", "heun", "", 10, 32, 204, 0)
FINGERPRINT = {"format": 1, "weights": {"a": "11"}, "edges": {"204": [0.1]}, "lpips": "none"}


def unit(*images: int, samples=(0,), cell=CELL, group=0) -> Unit:
    return Unit(cell, group, images, samples)


def rows_of(made: Unit, psnr=20.0, error=""):
    values = {} if error else {"psnr": psnr}
    return [row(key, error, **values) for key in made.keys]


@pytest.fixture(params=["local", "s3"])
def results(request, tmp_path) -> Results:
    if request.param == "local":
        return Results(at(tmp_path / "out"))
    return Results(at(f"{request.getfixturevalue('bucket')}/out"))


@pytest.mark.s3
def test_rows_come_back_as_they_were_written_sorted_by_key(results):
    second, first = unit(7, 3, samples=(0, 1), group=1), unit(5)
    for made in (second, first):
        results.write(made, rows_of(made))
    found = [key_of(r) for r in results.read().to_pylist()]
    wanted = [*second.keys, *first.keys]
    assert found == sorted(wanted, key=lambda key: key.flat) and len(found) == 5
    assert set(results.read()["error"].to_pylist()) == {""}, "an empty text, and never null"
    assert results.read(columns=("psnr",)).column_names[-1] == "psnr"


@pytest.mark.s3
def test_the_same_rows_twice_are_one_file_and_count_once(results):
    made = unit(1, 2)
    results.write(made, rows_of(made))
    before = results.storage.list("rows/")
    results.write(made, rows_of(made))
    assert results.storage.list("rows/") == before
    overlapping = unit(2, 3)
    results.write(overlapping, rows_of(overlapping))
    assert results.read()["image"].to_pylist() == [1, 2, 3]


def test_a_later_answer_stands_for_a_row_that_failed_in_whatever_order_they_are_read(tmp_path):
    for number, order in enumerate(((0, 1), (1, 0))):
        results = Results(at(tmp_path / f"{number}"))
        tries = [(unit(1, 2), "ValueError: no"), (unit(1), "")]
        for i in order:
            results.write(tries[i][0], rows_of(tries[i][0], error=tries[i][1]))
        found = results.read(columns=("psnr",)).to_pylist()
        assert [(r["image"], r["error"], r["psnr"]) for r in found] == [
            (1, "", 20.0), (2, "ValueError: no", None),
        ]  # fmt: skip


def test_a_damaged_file_is_told_and_its_rows_count_as_missing_until_they_are_made_again(
    tmp_path, caplog
):
    results, made = Results(at(tmp_path)), unit(1, 2)
    results.write(made, rows_of(made))
    other = unit(3, group=1)
    results.write(other, rows_of(other))
    [key] = [k for k in results.storage.list("rows/") if "/000000-" in k]
    whole = results.storage.read(key)
    results.storage.write(key, whole[:-40])
    assert results.read()["image"].to_pylist() == [3]
    assert f"{key} is damaged" in caplog.text and "count as missing" in caplog.text
    results.write(made, rows_of(made))
    assert results.storage.read(key) == whole and results.read().num_rows == 3


def test_nothing_is_read_where_nothing_was_written(tmp_path):
    assert Results(at(tmp_path)).read().num_rows == 0
    with pytest.raises(ResultsError, match="no evaluation was started here; run jobs/evaluate.py"):
        Results(at(tmp_path)).manifest()


@pytest.mark.s3
def test_a_place_holds_results_of_one_fingerprint(results):
    results.claim(FINGERPRINT)
    results.claim(json.loads(json.dumps(FINGERPRINT)))
    before = results.storage.read(MANIFEST)
    changed = {**FINGERPRINT, "weights": {"a": "22"}, "lpips": "33"}
    with pytest.raises(ResultsError) as refusal:
        results.claim(changed)
    assert "lpips: none -> 33" in str(refusal.value)
    assert "weights.a: 11 -> 22" in str(refusal.value) and "use another --out" in str(refusal.value)
    assert results.storage.read(MANIFEST) == before


def test_another_checkpoint_or_share_is_added_to_the_fingerprint(tmp_path):
    results = Results(at(tmp_path))
    results.claim(FINGERPRINT)
    results.claim({**FINGERPRINT, "weights": {"b": "22"}, "edges": {"51": [0.2]}})
    assert results.manifest()["weights"] == {"a": "11", "b": "22"}
    assert results.manifest()["edges"] == {"204": [0.1], "51": [0.2]}
    with pytest.raises(ResultsError, match="edges.51"):
        results.claim({**FINGERPRINT, "edges": {"51": [0.3]}})


def test_what_two_evaluations_add_at_once_is_kept_of_both(tmp_path, monkeypatch):
    mine, other = Results(at(tmp_path)), Results(at(tmp_path))
    mine.claim(FINGERPRINT)
    added = iter(({"weights": {"b": "22"}}, {"weights": {"c": "33"}}))

    def late(name):
        real = getattr(mine.storage, name)

        def write(*arguments):
            if (more := next(added, None)) and arguments[0] != MANIFEST or name == "write":
                other.claim({**FINGERPRINT, **(more or {"weights": {"c": "33"}})})
            return real(*arguments)

        return write

    for name in ("create", "write"):
        monkeypatch.setattr(mine.storage, name, late(name))
    mine.claim({**FINGERPRINT, "weights": {"d": "44"}})
    found = mine.manifest()["weights"]
    assert found.keys() >= {"a", "c", "d"}
    with pytest.raises(ResultsError, match="weights.c: 33 -> 99"):
        other.claim({**FINGERPRINT, "weights": {"c": "99"}})


def test_a_key_names_the_mean_of_several_samples_by_a_number_below_zero():
    made = unit(4, samples=(0, 1, -2))
    assert made.keys == [Key(CELL, 4, 0), Key(CELL, 4, 1), Key(CELL, 4, -2)]
    assert [key_of(r) for r in rows_of(made)] == made.keys


def test_truths_are_kept_once_for_each_image(tmp_path):
    results = Results(at(tmp_path))
    a, b = ({"image": i, "truth": bytes([i]), "known": [i, 9]} for i in (1, 2))
    results.keep_truths([a])
    results.keep_truths([a, b])
    assert sorted(results.truths(), key=lambda r: r["image"]) == [a, b]


def test_numbers_that_were_not_made_are_null_and_not_zero(tmp_path):
    results, made = Results(at(tmp_path)), unit(1)
    results.write(made, [row(made.keys[0], psnr=math.pi)])
    (found,) = results.read().to_pylist()
    assert found["psnr"] == math.pi and found["lpips"] is None and found["picture"] is None
