"""Jobs that `ray job submit` runs, as the READMEs write them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import FLAGS, staged

from mambaflow.evaluation.rows import Results
from mambaflow.search.board import Board
from mambaflow.search.ledger import Ledger
from mambaflow.storage import at

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RUN = [flag for flag in FLAGS if flag != "--no-ray"]
SEARCH = ["--space=size", "--num-samples=2", "--seed-trials=0", "--validations=4"]
EVALUATE = ["--samplers=mean", "--resolutions", "--known-shares", "--fills=linear", "--lpips=none",
            "--limit=3"]  # fmt: skip


def submit(*command: str, code: int = 0) -> str:
    ray = str(Path(sys.executable).parent / "ray")
    done = subprocess.run(
        [ray, "job", "submit", "--", sys.executable, *command],
        capture_output=True, text=True, timeout=400, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_sweep_is_a_job_and_so_is_the_evaluation_of_its_best(head, tmp_path):
    data, runs = staged(tmp_path / "data"), tmp_path / "runs"
    where = [f"--data={data}", f"--storage={runs}", "--run-name=sweep"]
    submit("tune/sweep.py", *RUN, *SEARCH, *where)
    board = Board.of(Ledger(at(runs / "sweep")).events())
    assert board.ended == "finished" and len(board.trials) == 2
    assert json.loads((runs / "sweep/best.json").read_bytes())["run_name"] == ""

    # A wrong flag is a job that failed, by its own exit code.
    said = submit("tune/sweep.py", *RUN, *SEARCH, *where, code=1)
    assert "exit code 2" in said

    best = runs / "sweep/trials" / board.best.name
    out = tmp_path / "out"
    submit("jobs/evaluate.py", f"--checkpoint={best}", f"--data={data}", f"--out={out}", *EVALUATE)
    rows = Results(at(out)).read()
    # Each of three images by the model's mean and by the fill.
    assert len(rows) == 6 and set(rows["error"].to_pylist()) == {""}
    assert (out / "report/index.html").exists()
