"""One request, however many signals it comes in."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mambaflow import signals
from mambaflow.signals import ASKING, STOPPED, kept, leaving, stopping, withheld

ASKED_ONCE = """
import signal, sys, time
from mambaflow import signals
signals.REPEAT_S = float(sys.argv[1])
asked = []
with signals.stopping(lambda number: asked.append(number.name), signal.SIGINT):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        if asked:
            print(*asked, flush=True)
"""


@pytest.mark.parametrize("number", ASKING)
def test_each_of_these_signals_asks_and_the_handlers_of_before_come_back(number):
    asked: list[signal.Signals] = []
    before = [signal.getsignal(n) for n in ASKING]
    with stopping(asked.append):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # handlers run between two instructions
        assert asked == [number], "several in a row are one request"
    assert [signal.getsignal(n) for n in ASKING] == before


def asked(repeat_s: float) -> subprocess.Popen:
    command = [sys.executable, "-c", ASKED_ONCE, str(repeat_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    return process


@pytest.mark.parametrize(
    ("repeat_s", "number"), [(0.0, signal.SIGTERM), (1e9, signal.SIGINT)], ids=["later", "ctrl-c"]
)
def test_who_insists_ends_the_process_at_once(repeat_s, number):
    process = asked(repeat_s)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number


def test_what_follows_at_once_is_the_same_request():
    process = asked(1e9)
    for number in ASKING:
        process.send_signal(number)
    assert [process.stdout.readline() for _ in range(20)] == ["SIGINT\n"] * 20
    process.kill()
    process.communicate()


def test_what_is_withheld_reaches_no_descendant_not_even_one_with_a_handler():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *a: print('got it'));"
        "print('ready', flush=True); time.sleep(0.5); print('asleep no more')"
    )
    with withheld(*ASKING):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in ASKING:
        process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "asleep no more\n" and process.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signals.REPEAT_S > 0


@pytest.mark.parametrize("number", ASKING)
def test_who_is_asked_to_leave_does_so_by_its_own_way_out(number):
    said = []
    with pytest.raises(SystemExit) as end, leaving():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            said.append("given back")
    assert end.value.code == STOPPED == 143 and said == ["given back"]


def test_what_saves_is_asked_in_place_of_leaving():
    asked: list[signal.Signals] = []
    with pytest.raises(SystemExit), leaving():
        with stopping(asked.append):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
        assert asked == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)


def test_handlers_that_are_set_by_others_are_put_back_and_end_with_our_code():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, kept():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert end.value.code == STOPPED
    assert signal.getsignal(signal.SIGTERM) == before
