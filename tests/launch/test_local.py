"""Jobs on this machine through submitit's local executor, as on a cluster; with a stand-in for Ray
but for one."""

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
from processes import processes, wait_for

from mambaflow.launch import submission
from mambaflow.launch.command import parsed
from mambaflow.launch.standing import Standing, cancel, standings
from mambaflow.launch.submission import SubmitConfig

ROOT = Path(__file__).parents[2]
STAND_IN = (sys.executable, str(ROOT / "tests/slurm/stand_in_ray.py"))
# Counts in a file; saves at SIGTERM and ends with 143, as jobs do.
COUNTING = """
import signal, sys, time
from pathlib import Path
count, last, asked = Path("count"), int(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
step = int(count.read_text()) if count.exists() else 0
print("begins after", step, flush=True)
while step < last and not asked:
    time.sleep(0.1)
    step += 1
count.write_text(str(step))
sys.exit(143 if step < last else 7)
"""


class Local:
    """A folder with local jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def count(self, last: int) -> Standing:
        (self.folder / "counting.py").write_text(COUNTING)
        config = SubmitConfig(local=True, folder=str(self.folder / "slurm"))
        command = parsed([str(self.folder / "counting.py"), str(last)], ROOT)
        plan = submission.planned(config, command, [], ROOT)
        (job,) = submission.submit(submission.with_ray(plan, STAND_IN))
        self.job = job
        wait_for(lambda: "begins" in self.said())
        return self.now()

    def now(self) -> Standing:
        (one,) = standings(self.folder / "slurm", [self.job])
        return one

    def said(self) -> str:
        logs = sorted(self.folder.rglob("command.log"), key=lambda p: p.stat().st_mtime)
        return "".join(p.read_text() for p in logs)


@pytest.fixture
def local(tmp_path, marked, monkeypatch):
    """Afterwards nothing may be left of what ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBAFLOW_SILENCE_S", "5")
    yield Local(tmp_path)
    wait_for(lambda: not [t for _, t in processes(marked) if t], 60)
    assert not list(tmp_path.rglob("token"))


def test_a_local_job_ends_with_its_commands_code(local):
    one = local.count(20)
    assert one.state == "RUNNING" and one.code is None
    wait_for(lambda: local.now().code is not None)
    assert local.now().code == 7 and len(one.task.attempts()) == 1


def test_a_local_job_that_is_cancelled_saves_and_is_not_started_again(local):
    cancel([local.count(1000)])
    wait_for(lambda: local.now().over)
    assert local.now().state == "ENDED" and local.now().code is None
    assert 0 < int((local.folder / "count").read_text()) < 1000
    assert local.said().count("begins") == 1


def test_a_local_job_whose_command_is_killed_is_started_again(local, marked):
    one = local.count(40)
    (command,) = [p for p, t in processes(marked) if "counting.py" in t]
    os.kill(command, signal.SIGKILL)
    wait_for(lambda: local.now().code is not None)
    assert local.now().code == 7 and len(one.task.attempts()) == 2
    assert local.said().count("begins") == 2


@pytest.mark.ray
def test_a_command_finds_a_ray_of_its_own(local, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(ROOT / "cluster"))
    slurm = importlib.import_module("slurm")
    script = local.folder / "nodes.py"
    script.write_text("import ray\nray.init()\nprint(len(ray.nodes()), 'node')\n")
    assert slurm.main(["submit", "--local", "--folder", "jobs", "--", str(script)]) == 0
    job = capfd.readouterr().out.split()[0]
    assert slurm.main(["logs", job, "--follow", "--folder", "jobs"]) == 0
    assert "1 node" in capfd.readouterr().out
    assert slurm.main(["status", job, "--wait", "--folder", "jobs"]) == 0
