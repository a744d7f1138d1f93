"""What is added to a command, so that it is the same run at every start."""

import json
from pathlib import Path

import pytest

from mambaflow.launch.command import (
    Command,
    named,
    parsed,
    resumed,
    storage,
    with_own_space,
)
from mambaflow.run_paths import RunPaths

ROOT = Path(__file__).parents[2]


def train(*arguments: str) -> Command:
    return Command("jobs/train.py", arguments)


def test_a_run_gets_the_name_and_place_that_it_would_choose_anew_at_every_start(tmp_path):
    command = named(train("--arch=v2", f"--storage={tmp_path}"), "mine", nodes=4, gpus_per_node=8)
    assert command.value("run-name") == "mine" and command.value("storage") == str(tmp_path)
    assert command.value("num-workers") == "32" and command.has("use-gpu")
    own = named(train("--run_name", "x", "--num_workers", "2"), "mine", nodes=4, gpus_per_node=8)
    assert own.value("run-name") == "x" and own.value("num-workers") == "2"
    assert not own.has("use-gpu")


def test_commands_without_resume_are_left_as_they_are():
    command = Command("jobs/evaluate.py", ("--out=x",))
    assert named(command, "mine", 2, 0) == command == resumed(command, begun=True)


def test_the_storage_is_that_of_the_configuration_unless_a_flag_says_otherwise(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"storage": "s3://b/runs"}))
    config = f"--config={tmp_path / 'config.json'}"
    assert storage(train(config)) == "s3://b/runs" and storage(train()) == "runs"
    assert storage(train(config, "--storage=here")) == "here"
    with pytest.raises(ValueError, match=r"config \(='none.json'\) must be"):
        storage(train("--config=none.json"))


def test_a_run_is_resumed_only_if_this_submission_began_it(tmp_path):
    command = train(f"--storage={tmp_path}", "--run-name=x")
    assert resumed(command, begun=True) == command, "killed before it had opened its folder"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / RunPaths.CONFIG).write_text("{}")
    assert resumed(command, begun=False) == command, "another's run is for the job to refuse"
    again = resumed(command, begun=True)
    assert again.has("resume") and resumed(again, begun=True) == again


def test_scripts_of_the_checkout_are_named_by_their_place_in_it(tmp_path, monkeypatch):
    assert parsed(["python", "jobs/train.py", "--x"], ROOT) == train("--x")
    monkeypatch.chdir(tmp_path)
    assert parsed(["jobs/train.py"], ROOT) == train()
    (tmp_path / "own.py").write_text("")
    assert parsed(["own.py"], ROOT).script == str(tmp_path / "own.py")
    with pytest.raises(ValueError, match=r"command \(=jobs/trian.py\) must be a Python file"):
        parsed(["jobs/trian.py"], ROOT)
    with pytest.raises(ValueError, match="must follow after --"):
        parsed([], ROOT)


def test_a_space_is_read_from_the_code_that_was_submitted_or_refused(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "tune").mkdir(parents=True)
    for file in (root / "tune/mine.py", tmp_path / "other.py"):
        file.write_text("")

    def space(given: str) -> str | None:
        sweep = Command("tune/sweep.py", (f"--space={given}", "--seed=1"))
        found = with_own_space(sweep, root, ["tune"])
        assert found.value("seed") == "1"
        return found.value("space")

    assert space("size") == "size"
    assert space("tune/mine.py:f") == space(f"{root}/tune/mine.py:f") == "tune/mine.py:f"
    monkeypatch.chdir(root / "tune")
    assert space("mine.py:f") == "tune/mine.py:f"
    for outside in (f"{tmp_path}/other.py:f", "none.py:f"):
        with pytest.raises(ValueError, match=r"space \(=.*:f\) must be a file of the code that is"):
            space(outside)
    assert with_own_space(train("--space=none.py:f"), root, []) == train("--space=none.py:f")
