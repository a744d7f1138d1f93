"""What is refused before a scheduler is asked."""

from pathlib import Path

import pytest

from mambaflow.launch.command import Command
from mambaflow.launch.submission import SubmitConfig, minutes, planned, read_lines

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("24:00:00", 1440), ("1-12", 2160), ("2-0:30", 2910),
     ("1-1:1:1", 1502)],
)  # fmt: skip
def test_times_are_those_of_slurm(text, expected):
    assert minutes(text) == expected


BAD = {
    "no time": ({"time": "soon"}, r"time \(='soon'\) must be a time as Slurm has it"),
    "no time to save": ({"time": "6"}, r"time \(=6\) must be 5 minutes or more beside grace_s"),
    "no node": ({"nodes": 0}, r"nodes \(=0\) must be positive; use 1 or more"),
    "two local nodes": ({"nodes": 2, "local": True}, r"nodes \(=2\) must be 1 with --local"),
    "a path for a name": ({"name": "a/b"}, r"name \(='a/b'\) must be a plain name"),
    "half an option": ({"sbatch": ["--x=1"]}, r"sbatch \(='--x=1'\) must be an option of sbatch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_are_refused_with_their_cure(case):
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        SubmitConfig(**given)


def test_only_an_elastic_run_may_shrink():
    config = SubmitConfig(on_node_loss="shrink")
    with pytest.raises(ValueError, match="on_node_loss .* --min-workers"):
        planned(config, Command("jobs/train.py", ()), [], ROOT)
    assert planned(config, Command("jobs/train.py", ("--min-workers=1",)), [], ROOT).commands


def test_each_line_of_an_array_is_a_run_of_its_own(tmp_path):
    (tmp_path / "grid").write_text("--seed 1\n# none\n\n--seed 2\n")
    lines = read_lines(str(tmp_path / "grid"))
    config = SubmitConfig(name="grid", folder=str(tmp_path / "slurm"))
    plan = planned(config, Command("jobs/train.py", ()), lines, ROOT)
    assert [c.value("run-name") for c in plan.commands] == ["grid-0", "grid-1"]
    assert [c.value("seed") for c in plan.commands] == ["1", "2"]
    assert not (tmp_path / "slurm").exists()
    for name in ("empty", "missing"):
        (tmp_path / "empty").write_text("#\n")
        with pytest.raises(ValueError, match=r"array \(=.*\) must"):
            read_lines(str(tmp_path / name))
