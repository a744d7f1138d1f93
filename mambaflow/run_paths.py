"""Where the files of a run are: every name in a run's folder, here and nowhere else.

<storage>/<run_name>/
  config.json                 what was asked for
  metrics.jsonl               the training and validation curves; events.out.tfevents.* the same
  step_0000400/               checkpoints: the newest, and the best on validation
  report/                     results.json, table.md and picture.png on the test split
  owner/0001.json             which process trains it (see lease)
  STOP                        put there by anyone: checkpoint and stop
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mambaflow.checks import require
from mambaflow.config import RunConfig
from mambaflow.storage import at
from mambaflow.storage_base import Storage

# What a folder may be, and the file that makes it so: the first that is written there.
FIRST_OF = {
    "a run": "config.json",
    "a sweep": "sweep.json",
    "results of an evaluation": "manifest.json",
    "staged data": "claim.json",
}


def require_free(folder: Storage, own: str, what: str, cure: str) -> None:
    """Refuse a folder that is of another kind than the one whose first file is `own`: they would
    write over one another's report.

    Raises:
        ValueError: naming what the folder is.
    """
    for kind, first in FIRST_OF.items():
        require(
            first == own or not folder.exists(first),
            f"{what} holds {kind} ({folder.uri}/{first}); {cure}",
        )


@dataclass(frozen=True)
class RunPaths:
    """A run's folder, and the keys of what it holds."""

    folder: Storage

    # Keys below the run's folder; as ClassVars they are no fields of the dataclass.
    CONFIG: ClassVar[str] = FIRST_OF["a run"]
    METRICS: ClassVar[str] = "metrics.jsonl"
    # A file and no signal: who asks and who trains may be on different machines.
    STOP: ClassVar[str] = "STOP"
    # The last file of a report: where it is, the others are.
    RESULTS: ClassVar[str] = "report/results.json"
    TABLE: ClassVar[str] = "report/table.md"
    PICTURE: ClassVar[str] = "report/picture.png"
    # The beginning of a folder's name; the step follows.
    CHECKPOINTS: ClassVar[str] = "step_"

    @classmethod
    def of(cls, config: RunConfig) -> "RunPaths":
        """Those of a configuration's run."""
        return cls(at(config.storage).child(config.run_name))

    @classmethod
    def at(cls, address: str | Path) -> "RunPaths":
        """Those of the run in a folder or at s3://…"""
        return cls(at(address))

    def uri(self, key: str) -> str:
        """The address of a file or folder of the run."""
        return f"{self.folder.uri}/{key}"

    @classmethod
    def checkpoint(cls, step: int) -> str:
        """Folder of the checkpoint after `step`."""
        # Seven digits, so that a listing by name is one by step.
        return f"{cls.CHECKPOINTS}{step:07d}"

    @classmethod
    def step(cls, key: str) -> int | None:
        """The step of the checkpoint in whose folder a key is, if it is in one."""
        # Of the folder itself or of a file in it, and of no other name that begins as one does.
        match = re.match(rf"{cls.CHECKPOINTS}(\d+)(/|$)", key)
        return int(match.group(1)) if match else None
