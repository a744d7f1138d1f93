"""jobs/evaluate.py and jobs/compare.py as their user meets them."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from processes import wait_for

from jobs.evaluate import BAD_INPUT, ROWS_FAILED, main, staged
from jobs.train import main as train
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation import answers
from mambaflow.evaluation.cells import EvaluateConfig
from mambaflow.evaluation.rows import Results
from mambaflow.storage import at

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small.staged(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> str:
    storage = tmp_path_factory.mktemp("runs")
    flags = [*small.FLAGS, f"--data={shards}", f"--storage={storage}", "--test-images=0"]
    assert train([*flags, "--run-name=done", "--epochs=1"]) == 0
    return f"{storage}/done"


def flags(shards: Path, run: str, out: Path, *more: str) -> list[str]:
    return [
        f"--checkpoint={run}", f"--data={shards}", f"--out={out}", "--no-ray", "--lpips=none",
        "--limit=4", "--nfe", "2", "--at-nfe=2", "--fills", "linear", *more,
    ]  # fmt: skip


def test_a_job_says_what_it_will_do_does_it_and_shows_a_table(shards, run, tmp_path, capsys):
    asked = flags(shards, run, tmp_path / "out", "--known-shares", "0.1")
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "4 of 16 images, 6 cells:" in said
    assert "done heun, 2 calls: 12 x 12, 14 known" in said
    assert "24 rows asked = 24 done + 0 failed, all unique" in said
    assert "| done posterior mean" in said and f"page         {tmp_path / 'out'}" in said
    table = (tmp_path / "out/report/table.md").read_text()
    assert table in said and "python jobs/evaluate.py" in table
    summary = json.loads((tmp_path / "out/report/summary.json").read_text())
    (mean,) = [e for e in summary["entries"] if e["sampler"] == "mean" and e["known"] == 28]
    assert f"{mean['numbers']['psnr']:.2f} ± {mean['numbers']['psnr_se']:.2f}" in table
    assert list((tmp_path / "out/tensorboard").glob("events.out.tfevents.*"))


def test_the_same_command_again_makes_nothing_and_the_report_can_be_made_alone(
    shards, run, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    assert main(flags(shards, run, out)) == 0
    before = {p: p.stat().st_mtime_ns for p in (out / "rows").rglob("*.parquet")}
    page = (out / "report/index.html").read_bytes()

    def never(*_, **__):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(answers, "complete", never)
    assert main(flags(shards, run, out)) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "rows").rglob("*.parquet")} == before
    (out / "report/index.html").unlink()
    capsys.readouterr()
    assert main([f"--out={out}", "--report-only"]) == 0
    assert (out / "report/index.html").read_bytes() == page
    assert main([f"--out={out}", "--status"]) == 0
    assert "12 rows asked = 12 done + 0 failed, all unique" in capsys.readouterr().out


def test_rows_that_fail_end_with_a_code_of_their_own_and_are_done_again_on_request(
    shards, run, tmp_path, capsys, monkeypatch
):
    asked = flags(shards, run, tmp_path / "out")
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise RuntimeError("no memory left")

        patch.setattr(answers, "complete", fail)
        assert main(asked) == ROWS_FAILED == 4
    assert "12 rows asked = 4 done + 8 failed, all unique" in capsys.readouterr().out
    assert "What failed?" in (tmp_path / "out/report/index.html").read_text()
    assert main(asked) == ROWS_FAILED, "what failed is not done again unasked"
    assert main([*asked, "--retry-errors"]) == 0
    assert "12 rows asked = 12 done + 0 failed" in capsys.readouterr().out


BAD = {
    "no such run": (["--checkpoint=runs/no"], "holds no complete checkpoint"),
    "no such data": (["--data=/no/such"], "/no/such"),
    "a bucket nobody has": (["--data=s3:x/y"], "use s3://bucket/prefix"),
    "an unknown sampler": (["--samplers", "euler"], "unknown sampler 'euler'; valid: mean, "),
    "a smaller size": (["--resolutions", "6"], "resolutions (=[6]) must be at least 12"),
    "no weights of LPIPS": (["--lpips=/no/weights.pth"], "/no/weights.pth"),
    "a truth of the same size": (["--truth={shards}"], "must be a whole multiple of data's size"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_code_2_and_makes_nothing(shards, run, tmp_path, capsys, case):
    more, message = BAD[case]
    more = [flag.format(shards=shards) for flag in more]
    try:
        code = main(flags(shards, run, tmp_path / "out", *more))
    except SystemExit as ended:  # tyro's own way, for what a flag alone can be refused for
        code = ended.code
    assert code == BAD_INPUT == 2
    words = " ".join(capsys.readouterr().err.split())
    assert message in words, words
    assert not list(tmp_path.rglob("*.parquet"))


def test_results_of_something_else_are_not_touched(shards, run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(flags(shards, run, out)) == 0
    other = small.staged(tmp_path / "other", mask_seed=9)
    before = {p: p.read_bytes() for p in out.rglob("*.parquet")}
    assert main(flags(other, run, out)) == BAD_INPUT
    assert "holds results of something else (data." in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*.parquet")} == before


def test_rows_that_lost_their_manifest_are_not_taken_for_another_models(
    shards, run, tmp_path, capsys
):
    out, few = tmp_path / "out", ["--samplers", "mean", "--limit=2"]
    assert main(flags(shards, run, out, *few)) == 0
    (out / "manifest.json").unlink()
    assert main(flags(shards, run, out, *few)) == BAD_INPUT
    assert "holds rows, and no manifest.json that says what they are of" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()


def test_a_look_at_nothing_is_refused(tmp_path, capsys):
    for what in ("--status", "--report-only"):
        assert main([f"--out={tmp_path}", what]) == BAD_INPUT
        assert "run jobs/evaluate.py" in capsys.readouterr().err


def test_a_source_is_staged_beside_the_results(run, tmp_path, capsys):
    images = small.images(tmp_path / "images")
    out = tmp_path / "out"
    assert main(flags(images, run, out)) == 0
    assert "4 of 16 images, 3 cells:" in capsys.readouterr().out
    assert (out / "data/test/manifest.json").is_file()
    assert main(flags(images, run, out)) == 0, "staged once, found again"


@pytest.mark.s3
def test_a_source_in_s3_gives_the_rows_of_the_same_files_on_a_disk(run, tmp_path, bucket, capsys):
    images = small.images(tmp_path / "images")
    for file in images.rglob("*.png"):
        at(bucket).upload(file, f"some/images/{file.relative_to(images)}")
    assert main(flags(images, run, tmp_path / "here")) == 0
    assert main(flags(f"{bucket}/some/images/", run, tmp_path / "there")) == 0
    tables = [
        Results(at(tmp_path / out)).read().drop_columns("seconds") for out in ("here", "there")
    ]
    assert tables[0].num_rows == 12 and tables[0].equals(tables[1])
    assert main(flags(f"{bucket}/nothing", run, tmp_path / "none")) == BAD_INPUT
    assert "is not there: there is no object" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_source_of_more_classes_than_shards_have_labels_is_evaluated(tmp_path):
    images = small.images(tmp_path / "images") / "train"
    for number, file in enumerate(sorted(images.glob("any/*.png"))):
        (images / f"c{number:03d}").mkdir()
        file.rename(images / f"c{number:03d}" / file.name)
    for number in range(48, 140):
        (images / f"c{number:03d}").mkdir()
        shutil.copy(images / "c000/000.png", images / f"c{number:03d}/{number}.png")
    asked = EvaluateConfig(data=f"{tmp_path}/images", out=f"{tmp_path}/out", samplers=())
    assert set(ShardSet(staged(asked), "test").rows(np.arange(16)).labels.tolist()) == {-1}


def test_sigterm_ends_with_143_and_the_same_command_goes_on(shards, run, tmp_path):
    out = tmp_path / "out"
    asked = flags(shards, run, out, "--limit=16", "--resolutions", "48", "--samples=40")
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/evaluate.py"), *asked], stdout=subprocess.DEVNULL
    )
    wait_for(lambda: at(str(out)).list("rows/"))
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 143
    kept = Results(at(str(out))).read(columns=()).num_rows
    assert 0 < kept


def test_comparing_is_evaluating_both_with_flags_that_can_be_overruled(shards, run, tmp_path):
    more = [
        f"--data={shards}", f"--out={tmp_path / 'out'}", "--lpips=none", "--no-ray", "--limit=2",
        "--samplers", "mean", "heun", "--nfe", "2", "--at-nfe=2", "--resolutions", "24",
        "--fills", "linear", "--samples=2", "--known-shares", "0.1", "--asked", "20",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/compare.py"), "--v1", run, f"--v2={run}", *more],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"python jobs/evaluate.py --checkpoint V1={run} V2={run} ")
    assert first.count("--samplers") == first.count("--nfe") == first.count("--samples") == 1
    assert "exponential" not in first and "--known-shares 0.1" in first
    page = (tmp_path / "out/report/index.html").read_text()
    assert "<title>V1 against V2" in page and "Is V2 better than V1?" in page


def test_help_names_every_flag_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for name in ("--checkpoint", "--known-shares", "--retry-errors", "--report-only", "--status"):
        assert name in text
