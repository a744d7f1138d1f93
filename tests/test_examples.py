"""Examples of a property: the same at every run of the tests, new ones and more of them to fuzz.

Both in processes of their own, by a small file of tests under this folder's conftest.py.
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
PROPERTY = """
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

@pytest.mark.parametrize("way", ["one", "other"])
@settings(max_examples=7)
@given(number=st.integers())
def test_numbers(way, number):
    with open("drawn", "a") as drawn:
        print(way, number, file=drawn)

def test_without_examples():
    print(file=open("ran", "w"))
"""


def drawn(folder: Path, *options: str) -> list[str]:
    """The examples that one run of the file draws, all of them, in order."""
    folder.mkdir()
    (folder / "test_property.py").write_text(PROPERTY)
    place = [f"--rootdir={folder}", f"--confcutdir={folder}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", *place, *options, "test_property.py"],
        cwd=folder, env={"PYTHONPATH": str(TESTS)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "drawn").read_text().splitlines()


def test_the_tests_draw_the_same_examples_at_every_run(tmp_path):
    first = drawn(tmp_path / "first")
    assert len(first) == 2 * 7
    assert drawn(tmp_path / "again") == first


def test_fuzzing_draws_new_examples_and_more_even_where_a_test_states_their_number(tmp_path):
    fuzz = ("--hypothesis-profile=fuzz", "-m", "hypothesis")
    first, again = drawn(tmp_path / "first", *fuzz), drawn(tmp_path / "again", *fuzz)
    assert len(first) == len(again) == 2 * 5 * 7 and first != again
    assert not (tmp_path / "first" / "ran").exists(), "what draws no examples is not run"
