"""What Slurm says is understood, in the words of its versions, and passed on where it is not."""

from mambaflow.launch.scheduler import JobState, parse_sacct, parse_scontrol, parse_squeue


def test_a_queue_is_read_whatever_its_states():
    text = "12|RUNNING|None|node[1-2]\n13_4|PENDING|BeginTime|\n14|SPECIAL_EXIT|x|\nslurm: what?\n"
    assert list(parse_squeue(text)) == [
        JobState("12", "RUNNING", "", "node[1-2]"),
        JobState("13_4", "PENDING", "BeginTime", ""),
        JobState("14", "SPECIAL_EXIT", "x", ""),
    ]
    assert not JobState("14", "SPECIAL_EXIT").over and JobState("1", "TIMEOUT").over


def test_accounts_of_a_requeued_job_end_with_its_last_try():
    text = "7|PREEMPTED|n1\n7.batch|FAILED|n1\n7|CANCELLED by 1000|n2\n8|COMPLETED\n9|FAILED\n"
    found = parse_sacct(text, ["7", "8"])
    assert found == {"7": JobState("7", "CANCELLED", "", "n2"), "8": JobState("8", "COMPLETED")}
    assert parse_sacct("Slurm accounting storage is disabled\n", ["7"]) == {}


def test_fields_are_read_from_a_line_and_from_a_list():
    line = "JobId=4 JobName=a b c JobState=PENDING Reason=BeginTime Restarts=1 NodeList="
    assert parse_scontrol(line) == {
        "JobId": "4", "JobName": "a b c", "JobState": "PENDING", "Reason": "BeginTime",
        "Restarts": "1", "NodeList": "",
    }  # fmt: skip
    listed = "Configuration data as of 2026\nMaxArraySize            = 1001\nKillWait = 30 sec\n"
    assert parse_scontrol(listed) == {"MaxArraySize": "1001", "KillWait": "30 sec"}
