"""The curves and pictures of a run, wherever the run is kept."""

import tempfile
from pathlib import Path

from mambaflow.report import RunLog
from mambaflow.storage import Storage


class Logbook:
    """The first worker's curves and pictures: a RunLog in the run's folder, or, when the run is
    in S3, in a scratch folder that `push` copies there."""

    def __init__(self, run: Storage, step: int) -> None:
        self.run = run
        self._scratch: tempfile.TemporaryDirectory | None = None
        if run.is_local:
            folder = Path(run.path)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="mambaflow-")
            folder = Path(self._scratch.name)
            if run.exists("metrics.jsonl"):
                run.download("metrics.jsonl", folder / "metrics.jsonl")
        self.folder = folder
        self.log = RunLog(folder, step)

    def push(self) -> None:
        """Make everything logged so far last."""
        self.log.flush()
        if self._scratch is None:
            return
        for file in sorted(self.folder.rglob("*")):
            if file.is_file():
                self.run.upload(file, file.relative_to(self.folder).as_posix())

    def close(self) -> None:
        """Push, and give the scratch folder back."""
        self.push()
        self.log.close()
        if self._scratch is not None:
            self._scratch.cleanup()
