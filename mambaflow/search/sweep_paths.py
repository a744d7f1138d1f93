"""Where the files of a sweep are: every name in its folder, here and nowhere else.

<storage>/<run_name>/
  sweep.json           what was asked for, and the base configuration
  ledger/0001.jsonl    what happened (see search.ledger)
  owner/0001.json      which process leads it (see lease)
  requests/            asked for while it runs: more-….json, stop-TRIAL.json
  trials/0003/         the run of a trial, as jobs/train.py would have it
  best.json            the best trial's configuration, for jobs/train.py --config
  report/              index.html, table.md, summary.json
  optuna.log           the same trials for optuna-dashboard
"""

from dataclasses import dataclass
from typing import ClassVar

from mambaflow.config import RunConfig
from mambaflow.run_paths import FIRST_OF
from mambaflow.storage import at
from mambaflow.storage_base import Storage


@dataclass(frozen=True)
class SweepPaths:
    """A sweep's folder, and the keys of what it holds."""

    folder: Storage

    CONFIG: ClassVar[str] = FIRST_OF["a sweep"]
    REQUESTS: ClassVar[str] = "requests/"
    TRIALS: ClassVar[str] = "trials"
    BEST: ClassVar[str] = "best.json"
    PAGE: ClassVar[str] = "report/index.html"
    TABLE: ClassVar[str] = "report/table.md"
    SUMMARY: ClassVar[str] = "report/summary.json"
    OPTUNA: ClassVar[str] = "optuna.log"

    @classmethod
    def of(cls, run: RunConfig) -> "SweepPaths":
        """Those of the sweep whose base configuration this is."""
        return cls(at(run.storage).child(run.run_name))

    @property
    def trials(self) -> str:
        """The address under which the trials' runs are."""
        return f"{self.folder.uri}/{self.TRIALS}"

    def trial(self, name: str) -> Storage:
        """The run folder of a trial."""
        return self.folder.child(self.TRIALS).child(name)
