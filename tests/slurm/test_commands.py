"""cluster/slurm.py on a real Slurm, as a person types it; jobs have a stand-in for Ray."""

import importlib
import os
from collections.abc import Callable

import pytest
from lab import run
from processes import wait_for
from submitted import ROOT, STAND_IN, Job

from mambaflow.launch import submission

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture
def slurm(cluster, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """The command; its exit code and what it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "cluster"))
    module = importlib.import_module("slurm")
    made = submission.planned
    monkeypatch.setattr(module, "planned", lambda *a: submission.with_ray(made(*a), STAND_IN))
    monkeypatch.setattr(module, "LOOK_S", 0.5)

    def call(*argv: object) -> tuple[int, str, str]:
        code = module.main([str(a) for a in argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def counting(cluster) -> list[str]:
    return cluster.counting()


def test_a_job_is_submitted_followed_and_awaited_by_commands_alone(slurm, counting, cluster):
    code, out, err = slurm("submit", "--nodes", 2, "--time", 30, "--name", "mine", "--", *counting,
                           30, 7)  # fmt: skip
    assert code == 0 and "counting.py" in out, err
    job = out.split()[0]
    assert f"python cluster/slurm.py logs {job} --follow" in out
    code, out, err = slurm("logs", job, "--follow")
    assert (code, err) == (0, "") and out.startswith(f"--- attempt {job}.0-node")
    assert "begins after 0" in out and out.endswith("ends after 30\n"), "to the end, and no longer"
    code, out, _ = slurm("status", job, "--wait")
    assert code == 7 and "done, exit code 7; 1 attempt(s)" in out
    assert slurm("status")[:2] == (0, out), "without --wait its own, over all submissions"


def test_a_job_that_is_cancelled_by_command_is_over_for_good(slurm, counting, cluster):
    _, out, _ = slurm("submit", "--nodes", 2, "--time", 30, "--", *counting, 1000, 0)
    job = out.split()[0]
    wait_for(lambda: "begins" in slurm("logs", job)[1])
    code, out, _ = slurm("cancel", job)
    assert code == 0 and out == f"{job}  cancelled\n"
    code, out, _ = slurm("status", job, "--wait")
    assert code == 1 and "cancelled" in out and "1 attempt(s)" in out
    # As an administrator might: its mark holds against that, too.
    run("scontrol", "requeue", job)
    wait_for(lambda: "Restarts=1" in run("scontrol", "show", "job", job))
    wait_for(lambda: "ExitCode=143:0" in run("scontrol", "show", "job", job))
    assert "1 attempt(s)" in slurm("status", job)[1]


def test_a_job_that_has_not_begun_says_why_in_its_logs(slurm, counting, cluster):
    _, out, _ = slurm("submit", "--sbatch", "hold", "--time", 30, "--", *counting, 1, 0)
    job = out.split()[0]
    code, out, err = slurm("logs", job)
    assert (code, out) == (0, "") and f"nothing yet: job {job} is pending (JobHeldUser)" in err
    run("scancel", job)
    assert slurm("status", job, "--wait")[0] == 1


def test_an_array_file_has_a_job_for_each_of_its_lines(slurm, counting, cluster):
    grid = cluster.folder / "grid"
    grid.write_text("# code\n3\n\n4\n")
    code, out, err = slurm("submit", "--array", grid, "--time", 30, "--", *counting, 1)
    jobs = [line.split()[0] for line in out.splitlines()[:2]]
    assert code == 0 and [j.partition("_")[2] for j in jobs] == ["0", "1"], err
    assert slurm("status", jobs[0], "--wait")[0] == 3
    assert slurm("status", jobs[0].partition("_")[0], "--wait")[0] == 4, "the worst of both"


def test_a_dry_run_shows_the_batch_file_and_leaves_nothing(slurm, counting, cluster):
    before = run("squeue", "-h", "-o", "%A")
    code, out, err = slurm("submit", "--dry-run", "--nodes", 2, "--time", 30, "--partition", "main",
                           "--", *counting, 1, 0)  # fmt: skip
    assert code == 0 and "#SBATCH --nodes=2" in out and "#SBATCH --partition=main" in out, err
    assert out.count("srun --unbuffered") == 1 and "scontrol requeue" in out
    assert not (cluster.folder / "slurm").exists() and run("squeue", "-h", "-o", "%A") == before


def test_what_a_person_gets_wrong_is_said_with_exit_code_2(slurm, counting, cluster):
    for argv, message in {
        ("submit", "--partition", "gpu", "--", *counting, "1", "0"): "partition (=gpu) must be",
        ("submit", "--", "jobs/trian.py"): "command (=jobs/trian.py) must be a Python file",
        ("submit",): "command (empty) must follow after --",
        ("status",): "must hold submissions; give the --folder of submit",
        ("sbumit",): "unknown action 'sbumit'; valid: submit",
    }.items():
        code, out, err = slurm(*argv)
        assert (code, out) == (2, "") and message in err
    assert not (cluster.folder / "slurm").exists()


def test_the_doctor_looks_at_the_cluster_and_at_every_node(slurm, cluster):
    folder = cluster.folder / "slurm"
    code, out, err = slurm("doctor", "--nodes", 2, "--folder", folder)
    assert code == 0 and "BAD" not in out, out + err
    assert "preempted job gets" in out and "PreemptMode=REQUEUE" in out
    for node in ("node1", "node2"):
        assert f"ok   {node} sees {folder}" in out and f"ok   {node} has Python" in out
    # /dev/shm is each node's own here: as a folder that is not shared.
    code, out, _ = slurm("doctor", "--nodes", 2, "--folder", f"/dev/shm/mfl-{os.getpid()}")
    os.rmdir(f"/dev/shm/mfl-{os.getpid()}")
    assert code == 1 and out.count("must be on a file system that all nodes share") == 2
    code, _, err = slurm("doctor", "--nodes", 0)
    assert code == 2 and "nodes (=0) must be positive" in err


def test_tensorboard_prints_the_tunnel_to_a_runs_curves(slurm, cluster):
    where = cluster.folder / "runs"
    _, out, err = slurm("submit", "--sbatch", "hold", "--time", 30, "--",
                        "jobs/train.py", "--arch=v2", f"--storage={where}")  # fmt: skip
    job = out.split()[0]
    code, out, _ = slurm("tensorboard", job)
    assert code == 0 and f"tensorboard --logdir {where} " in out and "ssh -N -L" in out, err
    run("scancel", job)


def test_a_job_that_the_scheduler_starts_twice_runs_once(slurm, counting, cluster):
    with cluster.held():
        first = cluster.count(60, code=5, nodes=1)
        first.running()
        submitit = first.plan.folder.path / "submitit"
        (batch,) = submitit.glob("*_submission.sh")
        # The same batch file once more while the first runs, under the number that it gets.
        second = run("sbatch", "--parsable", "--hold", str(batch)).strip()
        pickled = (submitit / f"{first.number}_submitted.pkl").read_bytes()
        (submitit / f"{second}_submitted.pkl").write_bytes(pickled)
        run("scontrol", "release", second)
        copy = Job(second, first.plan)
        attempts = copy.await_(lambda: len(first.attempts()) == 2 and first.attempts())
        assert first.task.exit_code() is None, "both are there at once"
    assert first.finish() == 5 and copy.finish() == 5
    assert "ExitCode=5:0" in run("scontrol", "show", "job", second)
    assert first.said().count("begins") == 1 and first.said().count("ends after 60") == 1
    assert [(p / first.task.LOG).exists() for p in attempts] == [True, False]
