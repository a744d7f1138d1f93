"""What a worker's process takes of its machine."""

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambaflow import host

ROOT = Path(__file__).parents[1]


def test_workers_share_the_cores_of_their_node(monkeypatch):
    monkeypatch.delenv("MAMBAFLOW_THREADS", raising=False)
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        host.share_threads(1)
        assert torch.get_num_threads() == cores
        host.share_threads(2 * cores)
        assert torch.get_num_threads() == 1
        host.share_threads(2 * cores, 2)
        assert torch.get_num_threads() == 2, "a configuration wins over the share"
        monkeypatch.setenv("MAMBAFLOW_THREADS", "3")
        host.share_threads(1)
        assert torch.get_num_threads() == 3
        host.share_threads(1, 2)
        assert torch.get_num_threads() == 3, "and the environment over the configuration"
    finally:
        torch.set_num_threads(before)


FAULTS = """
import ctypes, resource, sys, threading, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: their faults are few
from mambaflow.host import keep_memory
if sys.argv[1:] == ["kept", "main"]:
    assert keep_memory()

def step():
    for _ in range(4):
        torch.ones(2**24 + 1)  # 64 MiB, all of it written to

def train():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[2] == "thread":  # as under Ray
    worker = threading.Thread(target=train)
    worker.start()
    worker.join()
else:
    train()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_large_tensors_are_not_mapped_anew_at_every_step(where):
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how, where]
        plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        env = plain | (host.KEEP_MEMORY if (how, where) == ("kept", "thread") else {})
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return int(done.stdout)

    assert faults("kept") < 1000, "pages of 4 KiB; a step writes 65,536 of them"
    assert faults("given back") > 50_000


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert host.keep_memory() is False


@pytest.mark.parametrize("name", ["MAMBAFLOW_CORES", "MAMBAFLOW_THREADS"])
@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", "2\r", "\u0662"])
def test_a_number_of_cores_or_threads_that_is_none_is_refused_by_name(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"{name} \(=.*\) must be a whole number above 0"):
        host.share_threads(1)


def test_cores_can_be_stated_and_an_empty_statement_is_none(monkeypatch):
    monkeypatch.setenv("MAMBAFLOW_CORES", "64")
    assert host.cores() == 64
    monkeypatch.setenv("MAMBAFLOW_CORES", "")
    assert host.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("job", ["jobs/train.py", "jobs/evaluate.py", "jobs/stage.py",
                                 "jobs/benchmark.py", "tune/sweep.py"])  # fmt: skip
def test_every_job_speaks_where_only_ascii_is_understood(job):
    main = next(
        node for node in ast.parse((ROOT / job).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )  # fmt: skip
    # First of all, behind its docstring: a refusal may quote what was given.
    assert ast.unparse(main.body[1]) == "speak_plainly()"


def test_output_in_ascii_loses_a_sign_and_not_the_job():
    code = "from mambaflow.host import speak_plainly as s; s(); print('24 \xb1 1'); exit(7)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "24 ? 1\n"), done.stderr
