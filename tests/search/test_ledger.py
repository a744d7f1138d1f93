"""The ledger of a sweep keeps every event, and one driver at a time."""

import json

import pytest

from mambaflow.search.ledger import Ledger, ReplacedError
from mambaflow.storage import at


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request, tmp_path):
    where = tmp_path if request.param == "local" else request.getfixturevalue("bucket")
    return at(where).child("sweep")


def test_what_is_appended_is_read_in_order_with_every_bit(storage):
    ledger = Ledger(storage)
    ledger.open()
    numbers = [0.1 + 0.2, 1e-300, 23.456789012345678]
    for number in numbers:
        ledger.append("said", number=number)
    found = Ledger(storage).events()
    assert [event["number"] for event in found] == numbers
    assert [event["event"] for event in found] == ["said"] * 3
    times = [event["time"] for event in found]
    assert times == sorted(times)


def test_a_second_driver_goes_on_in_a_file_of_its_own_and_the_first_stops(storage):
    first, second = Ledger(storage), Ledger(storage)
    first.open()
    first.append("one")
    second.open()
    second.append("two")
    before = storage.read("ledger/0001.jsonl")
    with pytest.raises(ReplacedError, match="taken over"):
        first.append("three")
    assert storage.read("ledger/0001.jsonl") == before
    assert [event["event"] for event in Ledger(storage).events()] == ["one", "two"]


def test_a_copy_of_a_file_counts_once_and_a_file_that_is_gone_ends_no_sweep(storage):
    for what in ("one", "two"):
        ledger = Ledger(storage)
        ledger.open()
        ledger.append(what)
    for copy in (".ipynb_checkpoints/0001-checkpoint.jsonl", "0001 (copy).jsonl"):
        storage.write(f"ledger/{copy}", storage.read("ledger/0001.jsonl"))
    assert [event["event"] for event in Ledger(storage).events()] == ["one", "two"]
    storage.delete("ledger/0001.jsonl")
    Ledger(storage).open()
    assert storage.exists("ledger/0003.jsonl")


def test_of_two_drivers_at_once_one_opens(storage, monkeypatch):
    first, second = Ledger(storage), Ledger(storage)
    seen = second._files()
    first.open()
    monkeypatch.setattr(second, "_files", lambda: seen)  # as it looked before the first was done
    with pytest.raises(ReplacedError):
        second.open()


def test_nothing_is_appended_before_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="opened"):
        Ledger(at(tmp_path)).append("one")


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"event": "said"})])
def test_a_line_that_is_no_event_is_refused_with_its_place(tmp_path, line):
    ledger = Ledger(at(tmp_path))
    ledger.open()
    ledger.append("one")
    path = tmp_path / "ledger" / "0001.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"0001\.jsonl:2 .*must be an event"):
        ledger.events()
