"""One real Slurm for all tests that need one, and their jobs."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, missing
from submitted import Cluster


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A Slurm of three nodes; where there can be none the test is skipped, loudly."""
    if why := missing():
        pytest.skip(f"NO SLURM: {why}")
    # Two runs at once would have the same ports and links. Not in pytest's folder, which is shut to
    # a cluster's other users.
    root = Path(tempfile.mkdtemp(prefix="mambaflow-lab-"))
    root.chmod(0o755)
    here = Lab(root)
    before = pytest.MonkeyPatch()
    before.setenv("SLURM_CONF", str(here.conf))
    try:
        here.start()
        yield here
    finally:
        here.stop()
        before.undo()
        shutil.rmtree(root)


@pytest.fixture
def cluster(lab: Lab, marked: str, tmp_path: Path, monkeypatch) -> Iterator[Cluster]:
    """Every node idle; afterwards nothing may be left of what the test submitted."""
    monkeypatch.setenv("MAMBAFLOW_SILENCE_S", "8")
    monkeypatch.chdir(tmp_path)
    lab.restore()
    ports = {name: lab.listening(name) for name in lab.names}
    made = Cluster(lab, tmp_path, marked)
    yield made
    lab.cancel_all()
    made.nothing_left(ports)
