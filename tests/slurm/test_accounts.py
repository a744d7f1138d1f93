"""A Slurm with accounting: sacct is believed where nobody knows better, and only there."""

from collections.abc import Iterator

import pytest
from accounts import Accounts, missing
from lab import run
from processes import wait_for

from mambaflow.launch import doctor, scheduler
from mambaflow.launch.standing import standings

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def accounts(lab) -> Iterator[Accounts]:
    """Accounting for these tests; where there can be none they are skipped, loudly."""
    if why := missing():
        pytest.skip(f"NO ACCOUNTING: {why}")
    here = Accounts(lab)
    here.start()
    yield here
    here.stop()


def recorded(job: str) -> list[str]:
    """Every state in which sacct has a job: one for each of its starts."""
    return run("sacct", "-X", "-n", "-P", "-D", "-j", job, "-o", "State").splitlines()


def test_sacct_tells_how_a_job_ended_that_the_controller_has_forgotten(accounts, cluster):
    job = cluster.count(30, code=7)
    job.running()
    run("scontrol", "requeue", job.number)
    assert job.finish() == 7
    wait_for(lambda: "Invalid job id" in asked("scontrol", "show", "job", job.number))
    # Its first start too is there, and is not the answer.
    wait_for(lambda: recorded(job.number) == ["REQUEUED", "FAILED"])
    assert scheduler.states([job.number])[job.number].state == "FAILED"
    (one,) = standings(job.plan.folder.path.parent, [job.number])
    assert one.over and one.code == 7


def asked(*command: str) -> str:
    try:
        return scheduler.ask(*command)
    except scheduler.SchedulerError as error:
        return str(error)


def test_a_cancelled_job_that_the_controller_has_forgotten_is_not_waited_for(accounts, cluster):
    job = cluster.count(1000)
    job.running()
    run("scancel", job.number)
    wait_for(lambda: "Invalid job id" in asked("scontrol", "show", "job", job.number))
    wait_for(lambda: recorded(job.number)[-1].startswith("CANCELLED by"))
    (one,) = standings(job.plan.folder.path.parent, [job.number])
    assert one.over and one.state == "CANCELLED" and one.code is None


def test_a_job_that_waits_for_another_start_is_not_over_whatever_sacct_says(accounts, cluster):
    with cluster.held():
        job = cluster.count(80)
        job.running()
        wait_for(lambda: cluster.counter.exists())
        cluster.lab.kill_node("node2")
        seen = []

        def again() -> bool:
            seen.extend(scheduler.states([job.number]).values())
            return len(job.attempts()) == 2

        job.await_(again)
    assert recorded(job.number)[0] in ("NODE_FAIL", "REQUEUED"), "sacct has an end"
    assert seen and not [one for one in seen if one.over]
    assert job.finish() == 0 and cluster.counter.read_text() == "80"


def test_the_doctor_tells_whether_there_is_accounting(accounts, cluster):
    said = [str(one) for one in doctor.settings(scheduler.configuration())]
    assert "ok   accounting: accounting_storage/slurmdbd, sacct" in said
