"""One living process owns a folder: the others are refused, and who is lost is replaced."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mambaflow import lease
from mambaflow.lease import Owner, newest, owning, taken_by
from mambaflow.storage import at

HOLD = """
import sys, time
from mambaflow import lease
from mambaflow.storage import at
lease.RENEW_S = 0.1
with lease.owning(at(sys.argv[1]), "the run") as number:
    print(number, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request, tmp_path):
    where = tmp_path if request.param == "local" else request.getfixturevalue("bucket")
    return at(where).child("run")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "VALID_S", 3.0)


@pytest.fixture
def holder(storage):
    """A process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.uri], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()


def test_who_comes_while_the_owner_lives_is_refused_by_its_name(storage, holder):
    with pytest.raises(ValueError, match=f"the run is owned by process {holder.pid} on .*lives"):
        with owning(storage, "the run"):
            pass
    assert newest(storage) == 1 and not taken_by(storage, 1)


def test_an_owner_of_this_machine_that_was_killed_is_replaced_at_once(storage, holder, monkeypatch):
    monkeypatch.setattr(lease, "VALID_S", 1e9)  # nobody waits
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with owning(storage, "the run") as number:
        assert number == newest(storage) == 2


def test_an_owner_that_ended_is_replaced_at_once(storage, holder, monkeypatch):
    monkeypatch.setattr(lease, "VALID_S", 1e9)
    holder.communicate("\n")
    with owning(storage, "the run") as number:
        assert number == 2
    with owning(storage, "the run") as number:
        assert number == 3


def test_a_process_of_another_container_is_not_taken_for_gone(storage, holder, monkeypatch):
    """Containers of one machine may all have its name, and see none of one another's processes."""
    monkeypatch.setattr(lease.os, "readlink", lambda path: "pid:[1]")
    monkeypatch.setattr(lease, "_began", lambda process: "")
    with pytest.raises(ValueError, match=f"owned by process {holder.pid} on .*lives"):
        with owning(storage, "the run"):
            pass


@pytest.mark.parametrize(("answer", "gone"), [(PermissionError, False), (ProcessLookupError, True)])
def test_a_process_that_is_hidden_from_others_than_its_user_is_not_gone(monkeypatch, answer, gone):
    def kill(process, number):
        raise answer

    monkeypatch.setattr(lease.os, "kill", kill)
    nobody = 2**22 + 1  # beyond what Linux gives
    assert Owner(lease._host(), nobody, "17", "x").is_gone == gone


def test_an_owner_that_is_not_heard_of_is_replaced_after_a_while(storage, holder):
    os.kill(holder.pid, signal.SIGSTOP)  # as far as others can see it is on a machine that is lost
    since = time.monotonic()
    with owning(storage, "the run") as number:
        assert number == 2 and time.monotonic() - since >= 3.0
    assert taken_by(storage, 1).startswith(f"process {os.getpid()} on ")


def test_of_another_machine_only_its_renewals_tell(storage):
    far = Owner("elsewhere", os.getpid(), "1", "far")
    storage.write("owner/0001.json", json.dumps(vars(far)).encode())
    stop = threading.Event()

    def renew():
        for renewals in range(1, 100):
            if stop.wait(0.2):
                return
            told = vars(far) | {"renewals": renewals}
            storage.write("owner/0001.json", json.dumps(told).encode())

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(ValueError, match="on elsewhere, which lives"):
        with owning(storage, "the run"):
            pass
    stop.set()
    thread.join()
    with owning(storage, "the run") as number:
        assert number == 2


def test_who_takes_over_does_not_ask_and_the_other_finds_out(storage, holder):
    with owning(storage, "the run", take_over=True) as number:
        assert number == 2
        assert taken_by(storage, 1) and not taken_by(storage, 2)
    holder.communicate("\n")
    # What the first wrote at its end is its own file.
    assert json.loads(storage.read("owner/0002.json"))["process"] == os.getpid()


def test_of_many_that_come_at_once_one_owns(storage):
    taken, refused, go = [], [], threading.Barrier(4)

    def come():
        go.wait()
        try:
            with owning(storage, "the run") as number:
                taken.append(number)
                time.sleep(1.5)
        except ValueError:
            refused.append(1)

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) + len(refused) == 4 and len(set(taken)) == len(taken)
    assert taken[0] == 1


def test_an_owners_file_of_another_version_holds_nobody_up(storage):
    storage.write("owner/0001.json", b'{"who": "?"}')
    with owning(storage, "the run") as number:
        assert number == 2
