"""The report of a sweep says what its ledger says, needs nothing but it, and hides nothing."""

import html
import itertools
import json
import math
import re

import pytest
from made_up import COMMAND, DAY, LAYERS, WIDTHS, Teller, run, sweep, twenty

from mambaflow.config import from_json
from mambaflow.search.sweep_paths import SweepPaths
from mambaflow.search.sweep_report import write_report
from mambaflow.storage import at

CAUSE = "RuntimeError: <b>no memory</b>\nat line 3"
QUESTIONS = [
    "Which configuration is best?",
    "Is that more than the noise of seeds?",
    "What does each field do?",
    "What does size cost?",
    "How did they learn?",
    "What was stopped early, and was that fair?",
    "Where did the time go?",
    "What failed?",
    "How it was measured",
]


def sections(page: str) -> dict[str, str]:
    """The HTML of each question."""
    found = {}
    for part in page.split("<section ")[1:]:
        title = re.search(r"<h2>(?:<span.*?</span>)?(.*?)</h2>", part)
        assert title
        found[html.unescape(title[1])] = part
    return found


def words(part: str) -> str:
    return html.unescape(re.sub(r"<.*?>", "", part)).replace("\N{NO-BREAK SPACE}", " ")


def tables(part: str) -> list[list[list[str]]]:
    """The cells of each table, its heading first."""
    found = []
    for figure in re.findall(r"<table.*?</table>", part, re.DOTALL):
        lines = re.findall(r"<tr>.*?</tr>", figure, re.DOTALL)
        cells = [re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL) for line in lines]
        found.append([[words(cell) for cell in line] for line in cells])
    return found


def by_trial(table: list[list[str]]) -> dict[str, dict[str, str]]:
    heading, *rows = table
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rows}


def page_of(paths: SweepPaths) -> dict[str, str]:
    return sections(paths.folder.read(paths.PAGE).decode())


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> SweepPaths:
    return sweep(tmp_path_factory.mktemp("sweep"), twenty(CAUSE))


@pytest.fixture(scope="module")
def said(paths) -> str:
    return write_report(paths, timed=False)


@pytest.fixture(scope="module")
def page(paths, said) -> dict[str, str]:
    return page_of(paths)


def test_every_question_that_the_ledger_answers_is_on_the_page(page):
    assert [*page] == QUESTIONS


def test_the_ranking_has_each_trial_in_its_place_with_its_numbers(page):
    ranked = by_trial(tables(page[QUESTIONS[0]])[0])
    names = [*ranked]
    assert names[:3] == ["0016", "0014", "0012"] and names[-3:] == ["0002", "0000", "0001"]
    assert len(names) == 19 and "0017" not in names, "those that failed stand by themselves"
    assert ranked["0016"] == {
        "trial": "0016", "PSNR (dB)": "23.60± 0.12", "budget spent": "100 %",
        "status": "finished", "d_model": "128", "num_layers": "8", "lr": "0.002",
    }  # fmt: skip
    assert ranked["base-1"]["status"] == "finished (base)" and ranked["base-1"]["d_model"] == "64"
    assert ranked["0002"]["status"] == "stopped, rung 2"
    assert ranked["0002"]["budget spent"] == "33 %"


def test_costs_stand_where_size_is_asked_for(page):
    costs = by_trial(tables(page[QUESTIONS[3]])[0])
    assert costs["0016"] == {
        "trial": "0016", "PSNR (dB)": "23.60± 0.12", "budget spent": "100 %",
        "parameters": "1,572,864", "TFLOPs": "9", "samples/s": "160",
    }  # fmt: skip
    assert costs["0000"]["TFLOPs"] == "1", "of a ninth of the budget"


def test_the_first_words_answer(paths, page):
    text = words(paths.folder.read(paths.PAGE).decode().split("<section")[0])
    assert "The best is trial 0016 (d_model 128, num_layers 8, lr 0.002): 23.60 ± 0.12 dB." in text
    assert "+0.60 dB against the base, more than the best of 17 equals" in text
    numbers = re.findall(r'<dd class="value">(.*?)</dd>', paths.folder.read(paths.PAGE).decode())
    assert numbers == ["23.60 dB", "+6.0 x", "20", "76 %"]


def test_how_far_the_sweep_is_stands_in_its_first_words(paths, said):
    told = "18 of 18 configurations were tried, and the base with 2 other seeds: 1 failed, "
    assert told + "16 finished, 3 stopped." in said
    assert told in words(paths.folder.read(paths.PAGE).decode().split("<section")[0])


def test_the_noise_is_told_with_what_is_not_known_of_it(page):
    text = words(page[QUESTIONS[1]])
    assert "3 runs of the base configuration have 23.00 dB" in text
    assert "0.100 dB from seed to seed (2 degrees of freedom)" in text
    assert "anything from 0.052 to 0.628 dB" in text
    rows = tables(page[QUESTIONS[1]])[0][1:]
    assert [row[1] for row in rows] == ["0008", "base-2", "base-1", "0016"]


def test_effects_stand_beside_the_noise_of_seeds(page):
    part = page[QUESTIONS[2]]
    titles = [words(one) for one in re.findall(r'<p class="name">.*?</p>', part)]
    assert titles == ["importance of each field beside the noise of seeds", "d_model", "lr",
                      "num_layers"], "the most important first"  # fmt: skip
    assert "noise of seeds" in words(re.findall(r"<svg.*?</svg>", part, re.DOTALL)[0])
    rows = {(row[0], row[1]): row[2:] for row in tables(part)[0][1:]}
    assert rows["d_model", "128"] == ["5", "+0.500± 0.000"]
    assert rows["lr", "0.008"] == ["7", "−0.150± 0.000"]
    assert "Trials that were stopped early are not in it" in words(part)


def test_what_was_stopped_is_judged(page):
    part = page[QUESTIONS[5]]
    assert "3 trials were stopped" in words(part) and "nothing was lost" in words(part)
    heading, first, second = tables(part)[0]
    row = dict(zip(heading, first, strict=True))
    assert (row["budget spent"], row["trials there"], row["stopped"]) == ("11 %", "20", "2")
    assert (row["it lacked (dB)"], row["most gained later (dB)"]) == ("2.63", "1.43")
    assert row["could have been best"] == "0" and second[:2] == ["2", "33 %"]


def test_all_places_are_accounted_for(page):
    shares, starts = tables(page[QUESTIONS[6]])
    assert sum(float(row[2].removesuffix(" %")) for row in shares[1:]) == pytest.approx(
        100, abs=0.3
    )
    assert shares[1][0] == "training and validation" and shares[1][2] == "76.3 %"
    assert by_trial(starts)["0000"] == {
        "trial": "0000", "starts": "1", "beginning (s)": "20.0", "training (s)": "10"
    }  # fmt: skip


def test_a_cause_is_shown_as_it_is_and_is_no_part_of_the_page(page):
    failed = by_trial(tables(page[QUESTIONS[7]])[0])
    assert [*failed] == ["0017"]
    assert failed["0017"]["cause"] == "RuntimeError: <b>no memory</b> at line 3"
    assert "<b>no memory" not in page[QUESTIONS[7]] and "&lt;b&gt;no memory" in page[QUESTIONS[7]]


def test_names_and_values_are_shown_as_they_are_and_are_no_part_of_the_page(tmp_path):
    hostile, teller = "<script>alert('1')</script>", Teller()
    teller.events[0] |= {"command": f"python `x` {hostile}"}
    for name, value in ((f"a{hostile}", hostile), ("b", "velocity"), ("c", "data")):
        run(teller.trial(name, {"train.weighting": value}), name, 23.0)
    paths = sweep(tmp_path, teller.events, configs=False, space=f"{hostile}.py:f")
    write_report(paths, timed=False)
    text = paths.folder.read(paths.PAGE).decode()
    assert "<script" not in text
    ranked = by_trial(tables(page_of(paths)[QUESTIONS[0]])[0])
    assert ranked[f"a{hostile}"]["weighting"] == hostile
    assert f"a sweep of {hostile}.py:f" in words(text)


def test_every_table_says_where_its_numbers_are_from(paths, page):
    captions = [
        words(one) for part in page.values()
        for one in re.findall(r"</table>.*?<figcaption.*?>(.*?)</figcaption>", part, re.DOTALL)
    ]  # fmt: skip
    assert len(captions) == sum(len(tables(part)) for part in page.values()) == 8
    for caption in captions:
        assert COMMAND in caption and f"date {DAY}" in caption and "search seed 0" in caption
        assert f"data {paths.folder.uri.removesuffix('/s')}/shards, seed 0" in caption


def test_all_commands_and_days_of_a_ledger_are_told(tmp_path):
    teller = Teller()
    again = Teller(begin=9000.0)
    again.events[0] |= {"command": f"{COMMAND} --resume", "day": "2026-01-07"}
    paths = sweep(tmp_path, teller.events + again.trial("a", {}).events)
    assert f"`{COMMAND}`; `{COMMAND} --resume`" in write_report(paths, timed=False)
    assert f"date {DAY} to 2026-01-07" in paths.folder.read(paths.TABLE).decode()


def test_the_terminal_is_told_the_table_and_where_the_rest_is(paths, said):
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in said.splitlines() if line.startswith("|")]  # fmt: skip
    assert lines[0] == ["trial", "d_model", "num_layers", "lr", "PSNR (dB)", "budget spent",
                        "parameters", "TFLOPs", "samples/s", "status"]  # fmt: skip
    assert lines[2] == ["0016", "128", "8", "0.002", "23.60 ± 0.12", "100 %", "1,572,864", "9",
                        "160", "finished"]  # fmt: skip
    assert paths.folder.read(paths.TABLE).decode() in said
    assert f"{paths.folder.uri}/{paths.PAGE}" in said and f"{paths.folder.uri}/best.json" in said


def test_the_best_configuration_is_its_trials_without_what_was_the_trials_own(paths, said):
    best = from_json(paths.folder.read(paths.BEST))
    trial = from_json(paths.trial("0016").read("config.json"))
    assert (best.model, best.train) == (trial.model, trial.train)
    assert (best.run_name, best.resume, best.command) == ("", False, "")
    assert best.storage == paths.folder.uri.removesuffix("/s") != trial.storage
    assert trial.scale.threads == best.scale.threads == 1, "with other threads: other bits"


def test_a_report_is_the_same_when_it_is_made_again(paths, said):
    first = {key: paths.folder.read(key) for key in (paths.PAGE, paths.TABLE, paths.SUMMARY)}
    paths.folder.delete_tree("report/")
    assert write_report(paths, timed=False) == said
    assert {key: paths.folder.read(key) for key in first} == first


# --- Sweeps of which there is little to tell ----------------------------------------------------


def test_a_sweep_without_a_trial_has_a_report_too(tmp_path):
    paths = sweep(tmp_path, [])
    said = write_report(paths)
    assert "none is the best" in said and "best.json    none" in said
    assert [*page_of(paths)] == [QUESTIONS[0], QUESTIONS[-1]]
    assert "No trial has been proposed yet" in words(page_of(paths)[QUESTIONS[0]])
    assert json.loads(paths.folder.read(paths.SUMMARY))["best"] is None
    assert not paths.folder.exists(paths.BEST)


@pytest.mark.parametrize("reports", [0, 1, 2])
def test_a_sweep_in_which_all_failed_says_why(tmp_path, reports):
    """Before their first report, after it, and after a second."""
    teller = Teller()
    for name in ("a", "b"):
        teller.trial(name, {"model.d_model": 32 if name == "a" else 64}).start(name)
        for report in range(1, reports + 1):
            teller.report(name, report / 9, 20.0, 10.0 * report, after=12.0)
        teller.end(name, "failed", "it broke")
    paths = sweep(tmp_path, teller.events)
    assert "it broke" in write_report(paths)
    page = page_of(paths)
    assert [row[-1] for row in tables(page["What failed?"])[0][1:]] == ["it broke"] * 2
    assert not tables(page[QUESTIONS[0]]) and ("How did they learn?" in page) == (reports > 1)


def test_scores_that_are_no_numbers_are_shown_as_none(tmp_path):
    teller = Teller()
    run(teller.trial("lost", {"model.d_model": 32}), "lost", math.nan)
    run(teller.trial("cut", {"model.d_model": 128}), "cut", math.nan, until=1 / 3)
    run(teller.trial("good", {"model.d_model": 64}), "good", 23.0)
    teller.trial("new", {"model.d_model": 256}).start("new")
    paths = sweep(tmp_path, teller.events)
    write_report(paths)
    ranked = by_trial(tables(page_of(paths)[QUESTIONS[0]])[0])
    assert [*ranked] == ["good", "lost", "cut", "new"]
    assert [row["PSNR (dB)"] for row in ranked.values()] == ["23.00± 0.12", "none", "none", ""]
    numbers = json.loads(paths.folder.read(paths.SUMMARY))["trials"]
    assert numbers[1]["reports"][-1]["scores"]["val/psnr"] is None


def test_where_the_base_is_the_best_nothing_is_gained_however_lucky_that_run_was(tmp_path):
    teller = Teller()
    run(teller.trial("a", {"model.d_model": 64}), "a", 24.0)
    run(teller.trial("b", {"model.d_model": 32}), "b", 23.0)
    run(teller.trial("seed", {"train.seed": 1}, "seed"), "seed", 22.0)
    paths = sweep(tmp_path, teller.events)
    assert "It is the base configuration: nothing that was tried is better" in write_report(paths)
    text = words(paths.folder.read(paths.PAGE).decode())
    assert "0.00 dB" in text and "the best is the base itself" in text


def test_a_single_trial_has_a_report_that_says_what_is_not_known(tmp_path):
    teller = Teller()
    run(teller.trial("a", {"model.d_model": 32}), "a", 23.0)
    paths = sweep(tmp_path, teller.events)
    assert "No run of the base configuration has ended" in write_report(paths)
    assert "It takes two finished runs" in words(page_of(paths)[QUESTIONS[1]])
    assert "One driver ran for 1.9 minutes, with places for 2 trials at once: 3.8 minutes" in words(
        page_of(paths)[QUESTIONS[6]]
    )


def test_without_two_configurations_to_compare_no_effect_is_told(tmp_path):
    teller = Teller()
    run(teller.trial("a", {"model.d_model": 32}), "a", 23.0)
    teller.trial("b", {"model.d_model": 128}).start("b")
    paths = sweep(tmp_path, teller.events)
    write_report(paths, timed=False)
    text = words(page_of(paths)[QUESTIONS[2]])
    assert "Too few proposed trials have come far enough to tell what these do" in text


def test_where_most_were_stopped_fields_are_compared_at_the_first_rung(tmp_path):
    """There all trials are, and a difference there is not the difference of those that went on."""
    teller = Teller(9)
    for number, ((width, of_width), (layers, of_layers)) in enumerate(
        itertools.product(WIDTHS.items(), LAYERS.items())
    ):
        name, values = f"{number:04d}", {"model.d_model": width, "model.num_layers": layers}
        until = 1.0 if width == 128 else 1 / 9
        run(teller.trial(name, values), name, 23 + of_width + of_layers, until)
    for seed, final in ((1, 22.9), (2, 23.1)):
        teller.trial(f"base-{seed}", {"train.seed": seed}, "seed")
        run(teller, f"base-{seed}", final, 1.0)
    paths = sweep(tmp_path, teller.events)
    write_report(paths, timed=False)
    part = page_of(paths)[QUESTIONS[2]]
    assert "From the 9 proposed trials that spent 11 % of their budget" in words(part)
    assert "those too count that were stopped" in words(part)
    rows = {(row[0], row[1]): row[2:] for row in tables(part)[0][1:]}
    for name, known in (("d_model", WIDTHS), ("num_layers", LAYERS)):
        for value, effect in known.items():
            told = f"{effect:+.3f}".replace("-", "−")
            assert rows[name, str(value)] == ["3", f"{told}± 0.000"]
    summary = json.loads(paths.folder.read(paths.SUMMARY))
    assert summary["compared_at"] == pytest.approx(1 / 9)


def test_too_few_trials_for_effects_are_said_to_be_too_few(tmp_path):
    teller = Teller()
    for name, width, layers in (("a", 32, 2), ("b", 64, 4), ("c", 32, 2)):
        values = {"model.d_model": width, "model.num_layers": layers}
        run(teller.trial(name, values), name, 23.0 + width / 100)
    paths = sweep(tmp_path, teller.events)
    write_report(paths, timed=False)
    text = words(page_of(paths)[QUESTIONS[2]])
    assert "The trials do not tell what these do: d_model, num_layers." in text
    assert "not told" in {row[3] for row in tables(page_of(paths)[QUESTIONS[2]])[0][1:]}


def test_a_list_is_shown_stage_by_stage_in_its_order(tmp_path):
    teller, values = Teller(), {}
    stages = [({"model.start": "plain"}, 21.0), ({"model.windows": False}, 20.5),
              ({"model.start": "process"}, 23.0)]  # fmt: skip
    for number, (more, final) in enumerate(stages):
        values = values | more
        run(teller.trial(f"{number}", values, label=f"<{number}>"), f"{number}", final)
    paths = sweep(tmp_path, teller.events, space="ablation", scheduler="none")
    write_report(paths, timed=False)
    page = page_of(paths)
    assert "What does each field do?" not in page
    assert tables(page["What does each stage add?"])[0][1:] == [
        ["0 <0>", "the first", "21.00", ""],
        ["1 <1>", "windows on → off", "20.50", "−0.50"],
        ["2 <2>", "start plain → process", "23.00", "+2.50"],
    ]
    assert [row[0] for row in tables(page[QUESTIONS[0]])[0][1:]] == ["2 <2>", "0 <0>", "1 <1>"]
    text = words(paths.folder.read(paths.PAGE).decode())
    assert "The best is trial 2 (<2>): 23.00 ± 0.12 dB" in text
    assert "windows on → off" in paths.folder.read(paths.TABLE).decode()


def test_a_trial_whose_folder_is_gone_has_no_configuration_to_give(tmp_path):
    teller = Teller()
    run(teller.trial("a", {"model.d_model": 32}), "a", 23.0)
    paths = sweep(tmp_path, teller.events)
    paths.folder.delete_tree("trials/")
    assert "has no config.json any more" in write_report(paths)
    assert not paths.folder.exists(paths.BEST)


def test_where_no_sweep_was_started_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="sweep.json is not there: no sweep was begun here"):
        write_report(SweepPaths(at(tmp_path)))
