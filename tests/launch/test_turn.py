"""Of two attempts that the scheduler started, one runs the command."""

import threading

import pytest

from mambaflow.launch.beat import longest_silence_s
from mambaflow.launch.task_folder import TaskFolder
from mambaflow.launch.turn import Turn, take


@pytest.fixture
def task(tmp_path, monkeypatch) -> TaskFolder:
    monkeypatch.setenv("MAMBAFLOW_SILENCE_S", "5")
    (tmp_path / "turns").mkdir()
    return TaskFolder(tmp_path)


def test_of_many_that_want_a_turn_at_once_one_gets_it(task):
    end = threading.Event()
    got: list[Turn | None] = []

    def go_on() -> bool:
        return not end.is_set()

    threads = [
        threading.Thread(target=lambda: got.append(take(task, "a", go_on))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while not [one for one in got if one]:
        pass
    end.set()
    for thread in threads:
        thread.join()
    assert [one.number for one in got if one] == [1]


def test_a_turn_that_was_given_back_is_had_at_once_and_a_silent_one_in_time(task):
    first = take(task, "a", lambda: True)
    assert first is not None and first.held()
    first.give_back()
    second = take(task, "b", lambda: True)
    assert second is not None and second.number == 2 and not first.held() and second.held()
    third = take(task, "c", lambda: True)  # the second says nothing more
    assert third is not None and third.number == 3 and not second.held()


def test_nobody_gets_a_turn_for_what_is_done(task):
    assert task.finish(7, "a") == 7 and task.finish(1, "b") == 7
    assert take(task, "c", lambda: True) is None


def test_a_silence_of_less_than_a_few_seconds_is_refused(task, monkeypatch):
    monkeypatch.setenv("MAMBAFLOW_SILENCE_S", "soon")
    with pytest.raises(ValueError, match=r"MAMBAFLOW_SILENCE_S \(='soon'\) must be 5"):
        longest_silence_s()
