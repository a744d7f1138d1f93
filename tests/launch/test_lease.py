"""Of two attempts that the scheduler started, one runs the command."""

import threading

import pytest

from mambaflow.launch import lease as leases
from mambaflow.launch.task_folder import TaskFolder


@pytest.fixture
def task(tmp_path, monkeypatch) -> TaskFolder:
    monkeypatch.setenv("MAMBAFLOW_LEASE_S", "5")
    (tmp_path / "leases").mkdir()
    return TaskFolder(tmp_path)


def test_of_many_that_want_a_lease_at_once_one_gets_it(task):
    end = threading.Event()
    got: list[leases.Lease | None] = []

    def go_on() -> bool:
        return not end.is_set()

    threads = [
        threading.Thread(target=lambda: got.append(leases.take(task, "a", go_on))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while not [one for one in got if one]:
        pass
    end.set()
    for thread in threads:
        thread.join()
    assert [one.number for one in got if one] == [1]


def test_a_lease_that_was_given_back_is_had_at_once_and_a_silent_one_in_time(task):
    first = leases.take(task, "a", lambda: True)
    assert first is not None and first.held()
    first.give_back()
    second = leases.take(task, "b", lambda: True)
    assert second is not None and second.number == 2 and not first.held() and second.held()
    third = leases.take(task, "c", lambda: True)  # the second says nothing more
    assert third is not None and third.number == 3 and not second.held()


def test_nobody_gets_a_lease_for_what_is_done(task):
    assert task.finish(7, "a") == 7 and task.finish(1, "b") == 7
    assert leases.take(task, "c", lambda: True) is None


def test_a_lease_of_less_than_a_few_seconds_is_refused(task, monkeypatch):
    monkeypatch.setenv("MAMBAFLOW_LEASE_S", "soon")
    with pytest.raises(ValueError, match=r"MAMBAFLOW_LEASE_S \(='soon'\) must be 5"):
        leases.lease_s()
