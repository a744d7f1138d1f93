"""Jobs on a real Slurm, with a stand-in for Ray: whatever happens to one, it ends, and once.

Ray itself is in test_ray_jobs.py; here is what is around it.
"""

import os
import signal
import stat
import time

import pytest
from lab import run
from processes import wait_for
from submitted import batch_files

from mambaflow.launch.submission import SubmitConfig

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_a_job_returns_its_commands_exit_code_and_its_token_is_nowhere(cluster):
    job = cluster.count(30, code=7)
    attempt = job.running()
    token = attempt / "token"
    secret = token.read_text()
    assert len(secret) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(job.plan.folder.path.stat().st_mode) == 0o700
    shown = run("scontrol", "show", "job", "-d", job.number)
    assert len(cluster.processes("stand_in_ray.py")) == 2
    assert job.finish() == 7
    assert job.state == "FAILED" and "ExitCode=7:0" in run("scontrol", "show", "job", job.number)
    assert attempt.name.startswith(f"{job.number}.0-node") and job.attempts() == [attempt]
    assert not token.exists()
    files = [p for p in job.plan.folder.path.rglob("*") if p.is_file()]
    assert batch_files(job) and any(p.suffix == ".pkl" for p in files)
    assert secret not in shown and not [p for p in files if secret.encode() in p.read_bytes()]
    assert batch_files(job).count("srun --unbuffered") == 1


def test_what_is_edited_while_a_job_waits_changes_nothing(cluster, tmp_path):
    job = cluster.count(1)
    code = job.plan.folder.path / "code"
    assert (code / "jobs/train.py").is_file() and (code / "mambaflow/config.py").is_file()
    assert f"export PYTHONPATH={code}" in batch_files(job)
    assert job.finish() == 0


def test_a_finished_job_that_is_requeued_returns_at_once(cluster):
    job = cluster.count(5, code=3)
    assert job.finish() == 3
    before = job.said()
    run("scontrol", "requeue", job.number)
    job.await_(lambda: job.restarts == 1)
    job.await_(lambda: job.state == "FAILED")
    assert len(job.attempts()) == 1 and job.said() == before
    assert "ExitCode=3:0" in run("scontrol", "show", "job", job.number)


def test_a_requeued_job_goes_on_where_it_was(cluster):
    with cluster.held():
        job = cluster.count(80)
        first = job.running()
        wait_for(lambda: cluster.counter.exists())
        run("scontrol", "requeue", job.number)
        second = job.running(attempts=2)
    assert job.finish() == 0 and job.restarts == 1
    assert first.name != second.name and second.name.startswith(f"{job.number}.1-")
    stopped = int(job.said().split("ends after ")[1].split()[0])
    assert f"begins after {stopped} " in job.said() and 0 < stopped < 80
    assert cluster.counter.read_text() == "80"


def test_a_preempted_job_goes_on_when_the_urgent_one_is_over(cluster):
    with cluster.held():
        job = cluster.count(80)
        job.running()
        wait_for(lambda: cluster.counter.exists())
        urgent = run("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive",
                     "--output=/dev/null", "--wrap=sleep 2").strip()  # fmt: skip
        job.running(attempts=2)
    assert job.finish() == 0 and job.restarts == 1
    assert "JobState=COMPLETED" in run("scontrol", "show", "job", urgent), "it did preempt"
    stopped = int(job.said().split("ends after ")[1].split()[0])
    assert 0 < stopped < 80 and f"begins after {stopped} " in job.said()


def test_a_job_that_is_preempted_without_notice_repeats_what_it_had_not_saved(cluster):
    with cluster.held():
        job = cluster.count(80, partition="abrupt")
        job.running()
        wait_for(lambda: cluster.counter.exists())
        run("sbatch", "-p", "urgent", "-N3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        job.running(attempts=2)
    assert job.finish() == 0 and job.restarts == 1 and cluster.counter.read_text() == "80"
    assert len(job.attempts()) == 2


def test_at_its_time_limit_a_job_saves_is_requeued_and_goes_on(cluster):
    with cluster.held():
        job = cluster.count(80, grace_s=40)
        job.running()
        wait_for(lambda: cluster.counter.exists())
        # The least that Slurm knows: the notice comes 40 s before, or up to a minute earlier.
        run("scontrol", "update", f"jobid={job.number}", "timelimit=1")
        job.running(attempts=2)
    run("scontrol", "update", f"jobid={job.number}", "timelimit=30")
    assert job.finish() == 0 and job.restarts == 1
    assert "SIGUSR2: the command is asked to stop" in job.told()
    assert cluster.counter.read_text() == "80"


def test_a_cancelled_job_is_not_started_again(cluster):
    job = cluster.count(1000)
    job.running()
    run("scancel", job.number)
    job.await_(lambda: job.state == "CANCELLED")
    assert job.restarts == 0 and len(job.attempts()) == 1 and "ends after" in job.said()


@pytest.mark.parametrize("victim", ["the command", "the first node's task", "another node's task"])
def test_a_kill_of_any_process_is_made_good(cluster, victim):
    with cluster.held():
        job = cluster.count(80)
        job.running()
        wait_for(lambda: cluster.counter.exists())
        tasks = cluster.tasks()
        assert len(tasks) == 2
        (command,) = cluster.processes("python", "counting.py")
        pid = {"the command": command, "the first node's task": tasks[0]}.get(victim, tasks[1])
        os.kill(pid, signal.SIGKILL)
        job.running(attempts=2)
    assert job.finish() == 0 and job.restarts == 1 and cluster.counter.read_text() == "80"


def test_a_command_that_is_killed_again_and_again_is_given_up(cluster):
    script = cluster.folder / "dies.py"
    script.write_text("import os; os.kill(os.getpid(), 9)")
    job = cluster.submit([str(script)], nodes=1)
    assert job.finish() == 1 and job.restarts == 3
    assert "gave up: the command was killed by signal 9" in job.task.why()


def test_the_loss_of_a_node_is_made_good_by_others(cluster):
    with cluster.held():
        job = cluster.count(80)
        job.running()
        wait_for(lambda: cluster.counter.exists())
        nodes = run("squeue", "-h", "-j", job.number, "-o", "%N").strip()
        assert nodes == "node[1-2]"
        cluster.lab.kill_node("node2")
        job.running(attempts=2)
    assert job.finish() == 0 and cluster.counter.read_text() == "80"
    assert "node2 has been silent for 8 s" in "".join(
        p.read_text() for p in (job.task.path / "faults").iterdir()
    )


def test_a_node_on_which_ray_fails_is_left_out_next_time(cluster, monkeypatch):
    monkeypatch.setenv("FAILING_NODE", "node2")
    job = cluster.count(10)
    assert job.finish() == 0 and job.restarts == 1
    assert job.task.excluded() == ["node2"]
    shown = run("scontrol", "show", "job", job.number)
    assert "ExcNodeList=node2" in shown and "NodeList=node[1,3]" in shown
    assert "Ray did not start on node2: no GPU found" in "".join(
        p.read_text() for p in (job.task.path / "faults").iterdir()
    )


@pytest.mark.parametrize("late", [False, True], ids=["as it starts", "as it runs"])
def test_a_job_outlives_the_scheduler(cluster, late):
    # Held until the controller has saved that there is such a job.
    saved = cluster.lab.root / "state/job_state"
    before = saved.stat().st_mtime_ns if saved.exists() else 0
    job = cluster.count(60, sbatch=["hold"])
    wait_for(lambda: saved.exists() and saved.stat().st_mtime_ns != before)
    run("scontrol", "release", job.number)
    with cluster.held():
        if late:
            job.running()
        else:
            job.await_(lambda: job.state == "RUNNING")
        cluster.lab.kill_controller()
        cluster.lab.start_controller()

    def done() -> bool:
        # What an administrator does: nodes may be drained for a job that they have twice. And what
        # the controller had not saved yet it has forgotten: that the job was released.
        cluster.lab.resumed()
        run("scontrol", "release", job.number, check=False)
        time.sleep(1)
        return job.task.exit_code() is not None

    job.await_(done)
    assert job.task.exit_code() == 0 and cluster.counter.read_text() == "60"
    # Once, whatever the scheduler thought of it.
    assert job.said().count("ends after 60") == 1


def test_two_jobs_on_one_node_do_not_meet(cluster):
    with cluster.held():
        jobs = [cluster.count(60, nodes=1), cluster.count(60, nodes=1)]
        attempts = [job.running() for job in jobs]
        where = {run("squeue", "-h", "-j", job.number, "-o", "%N").strip() for job in jobs}
        assert len(where) == 1, "Slurm fills a node before it takes the next"
        tokens = {(attempt / "token").read_text() for attempt in attempts}
        addresses = {(attempt / "address").read_text() for attempt in attempts}
    assert len(tokens) == len(addresses) == 2
    assert [job.finish() for job in jobs] == [0, 0]


def test_an_array_has_a_job_for_each_line_however_small_the_clusters_limit(cluster):
    script = cluster.folder / "code.py"
    script.write_text("import sys; print(sys.argv); sys.exit(int(sys.argv[1]))")
    cluster.submit([str(script)], nodes=1, lines=[f"{i} --x" for i in range(7)])
    assert len({job.number.split("_")[0] for job in cluster.jobs}) == 2, "MaxArraySize is 5"
    assert [job.finish() for job in cluster.jobs] == list(range(7))
    assert "'6', '--x'" in cluster.jobs[6].said()


BAD = {
    "no such partition": (
        {"partition": "gpu"}, r"partition \(=gpu\) must be .*; valid: abrupt, main, urgent"),
    "more nodes than exist": ({"nodes": 9}, r"nodes \(=9\), .* must be had in one partition"),
    "more CPUs than a node has": ({"cpus_per_node": 64}, r"cpus_per_node \(=64\)"),
    "a feature of none": ({"constraint": "h100"}, r"constraint \(='h100'\) must be of features"),
    "GPUs that are not there": ({"gpus_per_node": 8}, r"gpus_per_node \(=8\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_the_cluster_has_not_is_refused_before_anything_is_written(cluster, case):
    config, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        cluster.count(**config)
    assert not (cluster.folder / "slurm").exists()
    assert SubmitConfig()
