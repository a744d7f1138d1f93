"""The report of an evaluation says what its rows say, needs nothing but them, and hides nothing."""

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image
from test_evaluate import saved

from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.cells import NO_CHECKPOINT, Cell, EvaluateConfig, Key, Unit
from mambaflow.evaluation.evaluate import Done, evaluate, in_process
from mambaflow.evaluation.evaluation_page import EvaluationPage, Pictures
from mambaflow.evaluation.evaluation_report import PAGE, TABLE, write_report
from mambaflow.evaluation.metrics import Scores
from mambaflow.evaluation.plan import plan
from mambaflow.evaluation.rows import Results, ResultsError, key_of, row
from mambaflow.evaluation.summary import Summary, Way
from mambaflow.report.page import render
from mambaflow.report.palette import HUES, MARKERS
from mambaflow.storage import at

COMMAND = "python jobs/evaluate.py --checkpoint a=x b=y"
# The cell whose rows fail.
LOST = Cell("b", "exponential", "", 4, 12, 28, 0)
ERROR = "RuntimeError: no <memory> is left"
QUESTIONS = [
    "What are the answers worth?",
    "Is b better than a?",
    "What do they look like?",
    "How many calls does a sample need?",
    "Is a sample a sample?",
    "Do samples keep their law at any density?",
    "What are more known pixels worth?",
    "What are 24 x 24 pixels worth?",
    "Do samples know how sure they are?",
    "Where is it good, and where not?",
    "What is every way of answering worth?",
    "What failed?",
]


@dataclass
class Report:
    """An evaluation whose shards and checkpoints are gone, and its report."""

    results: Results
    gone: list[Path]
    truth: dict[int, np.ndarray]
    said: str

    @property
    def html(self) -> str:
        return self.results.storage.read(PAGE).decode()

    @property
    def summary(self) -> dict:
        return json.loads(self.results.storage.read("report/summary.json"))


def failing(job, out: str, units: list[Unit]) -> Iterator[Done]:
    """The rows of one cell fail; the others are made."""
    for unit in units:
        if unit.cell == LOST:
            Results(at(out)).write(unit, [row(key, ERROR) for key in unit.keys])
            yield Done(unit, len(unit.keys), 0.1)
    yield from in_process(job, out, [unit for unit in units if unit.cell != LOST])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    root = tmp_path_factory.mktemp("evaluation")
    data = small.staged(root)
    runs = {name: saved(root / name, data, seed) for seed, name in enumerate("ab", 1)}
    config = EvaluateConfig(
        checkpoint=tuple(f"{name}={uri}" for name, uri in runs.items()), data=str(data),
        out=str(root / "out"), limit=8, samplers=("mean", "heun", "exponential"), nfe=(2, 4),
        at_nfe=4, resolutions=(24,), known_shares=(0.1, 0.4), asked=(30,), samples=3,
        fills=("nearest", "linear"), lpips="none", pictures=7, ray=False,
    )  # fmt: skip
    results = Results(at(config.out))
    evaluate(plan(config), results, failing, command=COMMAND)
    held = ShardSet(str(data), "test").rows(np.arange(small.TEST), pixels=False)
    truth = dict(zip(held.ids.tolist(), held.images.reshape(-1, 12, 12, 3), strict=True))
    gone = [data, *map(Path, runs.values())]
    for folder in gone:
        shutil.rmtree(folder)
    return Report(results, gone, truth, write_report(results))


def sections(page: str) -> dict[str, str]:
    """The HTML of each question."""
    parts = page.split("<section ")[1:]
    found = {}
    for part in parts:
        title = re.search(r"<h2>(?:<span.*?</span>)?(.*?)</h2>", part)
        assert title
        found[html.unescape(title[1])] = part
    return found


def words(part: str) -> str:
    return html.unescape(re.sub(r"<.*?>", "", part)).replace("\N{NO-BREAK SPACE}", " ")


def tables(part: str) -> list[tuple[list[list[str]], str]]:
    """The cells of each table, its heading first, and its caption."""
    found = []
    for figure in re.findall(r"<figure.*?</figure>", part, re.DOTALL):
        lines = re.findall(r"<tr>.*?</tr>", figure, re.DOTALL)
        if lines:
            cells = [re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL) for line in lines]
            caption = re.search(r"<figcaption.*?</figcaption>", figure, re.DOTALL)
            text = words(caption[0]) if caption else ""
            found.append(([[words(cell) for cell in line] for line in cells], text))
    return found


def sheet(part: str) -> dict[tuple[str, str], np.ndarray]:
    """Column and row of each image, and its pixels."""
    found = {}
    for data, label in re.findall(r'src="data:image/png;base64,(.*?)" alt="(.*?)"', part):
        column, line = html.unescape(label).rsplit(", ", 1)
        found[column, line] = pixels(base64.b64decode(data))
    return found


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# --- A page of a real evaluation ----------------------------------------------------------------


def test_every_question_that_rows_answer_is_on_the_page(report):
    assert [*sections(report.html)] == [*QUESTIONS, "How it was measured"]


def test_no_shard_and_no_checkpoint_is_needed_for_a_report(report):
    assert report.gone and not any(folder.exists() for folder in report.gone)
    first = report.html
    report.results.storage.delete_tree("report/")
    write_report(report.results)
    assert report.html == first


def test_every_table_says_where_its_numbers_are_from(report):
    manifest = report.results.manifest()
    (request,) = report.results.requests()
    wanted = [
        COMMAND, "8 images", f"hash {manifest['data']['hash']}",
        f"masks of seed {manifest['data']['mask seed']}",
        f"a weights {manifest['weights']['a']}", f"b weights {manifest['weights']['b']}",
        manifest["code"], "seed 0", request["date"][:10],
    ]  # fmt: skip
    found = [caption for part in sections(report.html).values() for _, caption in tables(part)]
    assert len(found) == 5
    for caption in found:
        assert [one for one in wanted if one not in caption] == []


def test_rows_that_failed_are_told_with_their_error(report):
    ((heading, *rows), _), = tables(sections(report.html)["What failed?"])  # fmt: skip
    assert heading == ["method", "rows", "the first says"]
    # Of 8 images 3 samples each, and what they come to together.
    assert rows == [
        ["b exponential, 4 calls", "24", ERROR],
        ["b exponential, 4 calls, mean of 3", "8", ERROR],
    ]
    failed = {(e["sampler"], e["together"]): e for e in report.summary["entries"] if e["failed"]}
    assert {key: (e["failed"], e["images"], e["numbers"]) for key, e in failed.items()} == {
        ("exponential", 0): (24, 0, {}), ("exponential", 3): (8, 0, {}),
    }  # fmt: skip


TITLES = {
    "PSNR full": ("psnr", 2), "PSNR unknown": ("psnr_unknown", 2), "SSIM": ("ssim", 3),
    "speckle": ("speckle", 4), "fair speckle": ("fair_speckle", 4), "spread": ("spread", 2),
    "coherence": ("coherence", 2),
}  # fmt: skip


def named(entry: dict) -> str:
    """What a reader would call an entry of the data's own size."""
    if entry["checkpoint"] == NO_CHECKPOINT:
        return entry["sampler"]
    if entry["sampler"] == "mean":
        return f"{entry['checkpoint']} posterior mean"
    sampler = {"heun": "Heun", "exponential": "exponential"}[entry["sampler"]]
    more = f", mean of {entry['together']}" if entry["together"] else ""
    return f"{entry['checkpoint']} {sampler}, {entry['nfe']} calls{more}"


def test_the_numbers_of_the_terminal_are_those_of_the_summary_and_of_the_page(report):
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in report.said.splitlines() if line.startswith("|")]  # fmt: skip
    heading, _, *rows = lines
    terminal = {row[0]: dict(zip(heading, row, strict=True)) for row in rows}
    plain = [e for e in report.summary["entries"]
             if (e["resolution"], e["known"], e["asked"]) == (12, 28, 0)]  # fmt: skip
    assert {named(entry) for entry in plain} == set(terminal) and len(plain) == len(rows)
    for entry in plain:
        for title, (key, decimals) in TITLES.items():
            numbers, told = entry["numbers"], terminal[named(entry)][title]
            text = f"{numbers[key]:.{decimals}f}" if key in numbers else ""
            if f"{key}_se" in numbers and key.startswith("psnr"):
                text += f" ± {numbers[f'{key}_se']:.{decimals}f}"
            assert told == text
        assert terminal[named(entry)]["images"] == str(entry["images"])
    assert {row["images"] for row in terminal.values()} == {"8", "0"}, "0 where rows failed"
    assert report.results.storage.read(TABLE).decode() in report.said
    ((titles, *cells), _), = tables(sections(report.html)[QUESTIONS[-2]])  # fmt: skip
    assert {row[0] for row in cells} == set(terminal)
    for name, *numbers in cells:
        for title, told in zip(titles[1:], numbers, strict=True):
            if title in TITLES:
                assert told.split("±")[0] == terminal[name][title].split(" ±")[0]


def test_an_image_stands_beside_its_own_truth_and_is_the_rows_own(report):
    kept = {key_of(one): one["picture"] for one in report.results.read().to_pylist()}
    shown = sheet(sections(report.html)["What do they look like?"])
    columns = [*dict.fromkeys(column for column, _ in shown)]
    assert columns[:2] == ["truth", "known pixels"]
    cells = {
        "a posterior mean": Cell("a", "mean", "", 1, 12, 28, 0),
        "a Heun, 4 calls": Cell("a", "heun", "", 4, 12, 28, 0),
        "b posterior mean": Cell("b", "mean", "", 1, 12, 28, 0),
        "b Heun, 4 calls": Cell("b", "heun", "", 4, 12, 28, 0),
    }
    best = max("nearest linear".split(), key=lambda name: numbers_of(report, name)["psnr"])
    cells[best] = Cell(NO_CHECKPOINT, best, "", 0, 12, 28, 0)
    assert set(columns[2:]) == set(cells)
    lines = [*dict.fromkeys(line for _, line in shown)]
    assert len(lines) == 6
    for line in lines:
        image = int(line.removeprefix("image "))
        truth = report.truth[image]
        assert np.array_equal(shown["truth", line], truth)
        given = shown["known pixels", line]
        assert (given == truth).all(-1).sum() >= 28 and (given == 222).all(-1).sum() >= 144 - 28
        for column, cell in cells.items():
            picture = kept[Key(cell, image, 0)]
            assert np.array_equal(shown[column, line], pixels(picture))
            # Known pixels are copied: another image's answer would not have them.
            known = (given != 222).any(-1)
            assert np.array_equal(shown[column, line][known], truth[known])


def numbers_of(report: Report, sampler: str) -> dict[str, float]:
    (entry,) = (e for e in report.summary["entries"]
                if e["sampler"] == sampler and e["known"] == 28)  # fmt: skip
    return entry["numbers"]


def test_enlarged_answers_are_shown_at_their_own_size_and_in_part(report):
    shown = sheet(sections(report.html)["What are 24 x 24 pixels worth?"])
    assert {column for column, _ in shown} == {
        "truth", "a posterior mean, 24 x 24", "a Heun, 4 calls, 24 x 24",
        "b posterior mean, 24 x 24", "b Heun, 4 calls, 24 x 24",
    }  # fmt: skip
    # The sheet of parts comes last: half of a side each.
    assert {image.shape for (column, _), image in shown.items() if column == "truth"} == {(6, 6, 3)}
    assert {image.shape for (column, _), image in shown.items() if column != "truth"} == {
        (12, 12, 3)
    }


def test_equal_rows_make_equal_bytes_in_whatever_files_they_lie(report, tmp_path):
    shutil.copytree(report.results.storage.uri, tmp_path / "copy")
    other = Results(at(tmp_path / "copy"))
    other.storage.delete_tree("rows/")
    other.storage.delete_tree("report/")
    # Image by image, the last first.
    rows = report.results.read().to_pylist()
    for group, one in enumerate(rows[::-1]):
        key = key_of(one)
        other.write(Unit(key.cell, group, (key.image,), (key.sample,)), [one])
    write_report(other)
    for name in (PAGE, TABLE, "report/summary.json"):
        assert other.storage.read(name) == report.results.storage.read(name)


def test_every_command_that_rows_come_from_is_told(report, tmp_path):
    shutil.copytree(report.results.storage.uri, tmp_path / "copy")
    other = Results(at(tmp_path / "copy"))
    (request,) = other.requests()
    other.ask(
        request | {"command": "python jobs/evaluate.py --more", "date": "1999-12-31 12:00:00"}
    )
    write_report(other)
    page = sections(other.storage.read(PAGE).decode())
    for _, caption in (one for part in page.values() for one in tables(part)):
        assert COMMAND in caption and "python jobs/evaluate.py --more" in caption
        assert f"1999-12-31 to {request['date'][:10]}" in caption


def test_a_report_of_an_evaluation_under_way_says_so_and_shows_what_there_is(report, tmp_path):
    """Of the first image b's sample is not there yet, and of its 24 x 24 nothing."""
    assert "Not complete" not in report.html
    shutil.copytree(report.results.storage.uri, tmp_path / "copy")
    other = Results(at(tmp_path / "copy"))
    other.storage.delete_tree("rows/")
    rows = report.results.read().to_pylist()
    first = [row["image"] for row in report.results.truths()][0]

    def lost(key: Key) -> bool:
        late = key.cell.checkpoint == "b" and key.cell.is_sample and key.image == first
        return late or (key.cell.checkpoint == "b" and key.cell.resolution == 24)

    kept = [one for one in rows if not lost(key_of(one))]
    for group, one in enumerate(kept):
        key = key_of(one)
        other.write(Unit(key.cell, group, (key.image,), (key.sample,)), [one])
    write_report(other)
    page = other.storage.read(PAGE).decode()
    assert f"{len(rows) - len(kept)} rows are missing" in page
    shown = sheet(sections(page)["What do they look like?"])
    assert {column for column, _ in shown} >= {"a Heun, 4 calls", "b Heun, 4 calls"}
    assert f"image {first}" not in {line for _, line in shown}
    ((heading, *cells), _), = tables(sections(page)["What are 24 x 24 pixels worth?"])  # fmt: skip
    assert cells and not [line for line in cells if line[0].startswith("b")]


def test_where_no_evaluation_was_started_there_is_no_report(tmp_path):
    with pytest.raises(ResultsError, match="no evaluation was started here"):
        write_report(Results(at(tmp_path)))


def test_a_report_without_a_row_is_refused(report, tmp_path):
    results = Results(at(tmp_path))
    results.claim(report.results.manifest())
    with pytest.raises(ValueError, match="holds no rows yet; start the evaluation first"):
        write_report(results)


# --- Pages of rows that are made up -------------------------------------------------------------

HEUN = Cell("a", "heun", "", 10, 12, 28, 0)
MEAN = replace(HEUN, sampler="mean", nfe=1)
NO_PICTURES = Pictures({}, {}, {}, {})


def page_of(tmp_path, cells: dict[Cell, dict], images: int = 3) -> EvaluationPage:
    """Of rows with the same numbers for each image of a cell, but for a little."""
    results = Results(at(tmp_path))
    for group, (cell, numbers) in enumerate(cells.items()):
        rows = [
            row(Key(cell, i, 0), **{k: v + 0.01 * i if k != "error" else v
                                    for k, v in numbers.items()})
            for i in range(images)
        ]  # fmt: skip
        results.write(Unit(cell, group, tuple(range(images)), (0,)), rows)
    return EvaluationPage(Summary(results.read()), NO_PICTURES, 12, 28, "by hand", {"date": "now"})


def test_of_each_sampler_the_first_table_has_the_one_of_about_ten_calls(tmp_path):
    cells = [replace(HEUN, nfe=n) for n in (2, 8, 50)] + [replace(HEUN, sampler="sde", nfe=100)]
    page = page_of(tmp_path, {cell: {"psnr": 20.0} for cell in [MEAN, *cells]})
    assert page.ways.main == [Way(MEAN), Way(cells[1]), Way(cells[3])]
    assert page.ways.sample("a") == Way(cells[1])
    titles = [section.title for section in page.page().sections]
    assert titles == ["What are the answers worth?", "What is every way of answering worth?"]


def test_where_a_way_has_fewer_images_each_row_tells_how_many(tmp_path):
    cells = {MEAN: {"psnr": 20.0}, HEUN: {"psnr": 17.0}}
    alike = page_of(tmp_path / "alike", cells)
    (block,) = alike.page().sections[0].blocks
    assert "images" not in block.table.heading
    results = Results(at(tmp_path / "alike"))
    results.write(Unit(MEAN, 9, (7,), (0,)), [row(Key(MEAN, 7, 0), psnr=20.0)])
    more = EvaluationPage(Summary(results.read()), NO_PICTURES, 12, 28, "by hand", {})
    (block,) = more.page().sections[0].blocks
    place = block.table.heading.index("images")
    assert [line[place] for line in block.table.rows] == ["4", "3"]


def test_every_way_has_a_name_of_its_own(tmp_path):
    cells = [
        MEAN, HEUN, replace(HEUN, nfe=2), replace(HEUN, known=14), replace(HEUN, asked=30),
        replace(HEUN, resolution=24), replace(HEUN, resolution=24, known=14),
        replace(HEUN, sampler="ddim", settings="eta=0"),
        replace(HEUN, sampler="ddim", settings="eta=1"), replace(HEUN, checkpoint="b"),
        Cell(NO_CHECKPOINT, "linear", "", 0, 12, 28, 0),
        Cell(NO_CHECKPOINT, "linear", "", 0, 12, 14, 0),
    ]  # fmt: skip
    page = page_of(tmp_path, {cell: {"psnr_reduced": 20.0} for cell in cells})
    assert len({page.ways.label(way) for way in page.summary.entries}) == len(cells)
    assert len(page.rows(page.summary.entries)) == len(cells)


def test_more_models_and_samplers_than_there_are_looks_stand_in_tables_and_are_told(tmp_path):
    settings = [f"eta={n / 10}" for n in range(len(MARKERS))]
    cells = [
        replace(HEUN, checkpoint=f"m{n}", nfe=c) for n in range(len(HUES) + 1) for c in (2, 10)
    ]
    cells += [replace(HEUN, checkpoint="m0", sampler="ddim", settings=s) for s in settings]
    page = page_of(tmp_path, {cell: {"psnr": 20.0, "psnr_unknown": 19.0} for cell in cells})
    whole = page.page()
    (table, *_), _ = tables(sections(render(whole))["What is every way of answering worth?"])[0]
    names = {line[0] for line in tables(render(whole))[-1][0][1:]}
    assert table[0] == "method"
    assert names == {page.ways.label(Way(cell)) for cell in cells}
    left_out = whole.facts["not in charts"]
    assert f"m{len(HUES)} Heun" in left_out and "m0 DDIM (eta 0.5)" in left_out
    assert "m0 Heun" not in left_out


def test_where_there_is_a_real_image_of_that_size_answers_stand_against_it(tmp_path):
    large = replace(MEAN, resolution=24)
    agreement = {"psnr_reduced": 30.0, "psnr_bicubic": 28.0}
    found = {}
    for name, real in (("without", {}), ("with", {"psnr": 25.0, "rival_psnr": 24.0, "ssim": 0.8})):
        page = page_of(tmp_path / name, {large: agreement | real})
        (found[name],) = (s for s in page.page().sections if s.title == QUESTIONS[7])
    assert "There is no true image of this size" in found["without"].right
    assert "against the real images" in found["with"].right
    assert found["without"].blocks[0].table.heading == ["method", "reduced", "bicubic"]
    titles = found["with"].blocks[0].table.heading
    cells = found["with"].blocks[0].table.rows[0]
    assert dict(zip(titles, cells, strict=True)) == {
        "method": "a posterior mean, 24 x 24", "PSNR": "25.01 ± 0.01", "rival's PSNR": "24.01",
        "SSIM": "0.810",
    }  # fmt: skip


def test_a_way_without_an_answer_leaves_the_others_their_charts(tmp_path):
    """All rows of one share failed: the chart by share is of the two others."""
    cells = {replace(MEAN, known=k): {"psnr_unknown": 20.0} for k in (14, 28)}
    page = page_of(tmp_path, cells | {replace(MEAN, known=60): {"error": "OSError: gone"}})
    (section,) = (s for s in page.page().sections if s.title == "What are more known pixels worth?")
    assert "41.7" not in words(section.blocks[0].svg) and "19.4" in words(section.blocks[0].svg)


@pytest.mark.parametrize(("gain", "said"), [(1.5, "b gains 1.50 dB on a"),
                                            (-0.5, "b loses 0.50 dB to a")])  # fmt: skip
def test_the_first_sentences_answer_in_numbers(tmp_path, gain, said):
    """Of a's speckle of 0.04 b has 0.03."""
    cells = {}
    for name, psnr, speckle in (("a", 20.0, 0.04), ("b", 20.0 + gain, 0.03)):
        cells[replace(MEAN, checkpoint=name)] = {"psnr": psnr}
        cells[replace(HEUN, checkpoint=name)] = {"psnr": psnr - 3, "scores": speckled(speckle)}
    results = Results(at(tmp_path))
    for group, (cell, numbers) in enumerate(cells.items()):
        results.write(Unit(cell, group, (0,), (0,)), [row(Key(cell, 0, 0), **numbers)])
    page = EvaluationPage(Summary(results.read()), NO_PICTURES, 12, 28, "by hand", {})
    assert page.answer().startswith("From 19 % of the pixels: a posterior mean 20.00 dB, b ")
    assert f"{said}, image by image, and has 75 % of its speckle in one sample" in page.answer()
    assert page.numbers()[-1].value == "25 %"
    assert page.numbers()[-1].label == "of a's speckle gone in b's samples"
    assert page.page().title == "a against b"


def speckled(size: float) -> list[float]:
    """Sums of 100 flat values that lie so far from their medians."""
    sums = Scores()
    speckle = replace(sums.sums["speckle"], flat_values=100, prediction=100 * size)
    return Scores({**sums.sums, "speckle": speckle}).flat()


def test_of_fills_alone_there_is_a_page_too(tmp_path):
    fill = Cell(NO_CHECKPOINT, "linear", "", 0, 12, 28, 0)
    page = page_of(tmp_path, {fill: {"psnr": 21.5}})
    assert [section.title for section in page.page().sections] == QUESTIONS[:1]
    assert page.answer() == "From 19 % of the pixels: linear 21.51 ± 0.01 dB."
