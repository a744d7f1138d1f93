"""Ray's authentication is stated by a call, and where that is forgotten nothing starts."""

import subprocess
import sys

import pytest

UNSET = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def told(code: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a fresh process prints, with none of Ray's settings but those given."""
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SET = """
import os
from mambaflow.distributed.environment import is_set, set_ray_environment
before = is_set()
set_ray_environment()
first = os.environ.get("RAY_AUTH_TOKEN")
set_ray_environment()
print(before, is_set(), os.environ.get("RAY_AUTH_MODE"), len(first or ""),
      first == os.environ.get("RAY_AUTH_TOKEN"))
"""


def test_a_private_ray_gets_a_token_of_its_own_once(monkeypatch):
    assert told(SET, monkeypatch) == "False True token 64 True"


def test_what_a_user_states_stays(monkeypatch):
    assert told(SET, monkeypatch, RAY_AUTH_MODE="disabled") == "True True disabled 0 True"


def test_a_cluster_that_is_joined_has_its_own_mode(monkeypatch):
    assert told(SET, monkeypatch, RAY_ADDRESS="10.0.0.1:6379") == "True True None 0 True"


LATE = """
import ray
from mambaflow.distributed.environment import set_ray_environment
try:
    set_ray_environment()
except RuntimeError as error:
    print(error)
"""


def test_ray_imported_first_is_refused_since_it_has_settled_on_a_mode(monkeypatch):
    message = told(LATE, monkeypatch)
    assert "ray was imported before its authentication was stated" in message
    assert "before `import ray`" in message


FORGOTTEN = """
from mambaflow.distributed.cluster import connect
try:
    with connect():
        print("connected")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.ray
def test_no_cluster_starts_whose_authentication_nobody_stated(monkeypatch):
    message = told(FORGOTTEN, monkeypatch)
    assert "RAY_AUTH_MODE (unset) must be stated before Ray starts" in message
