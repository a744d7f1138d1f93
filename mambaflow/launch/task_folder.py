"""Where the files of a submission are: every name in its folder, here and nowhere else.

<folder>/<submission>/             for its owner alone: whoever writes here runs code on the cluster
  code/                            the code as it was when it was submitted
  submission.json                  what was asked for, and the numbers of its jobs; written last
  submitit/                        submitit's own: batch files, pickles, what its tasks print
  tasks/0/                         a command; of an array, one for each
    done.json                      its exit code: whoever starts it again only returns that
    cancelled                      nobody is to start it again
    excluded                       nodes that failed, for the scheduler to leave out
    faults/                        one file for each time that not the command was at fault
    turns/000001                   whose turn it is to run it; the highest number counts
    attempts/JOB.REQUEUES-NODE-PID/
      command.log                  what the command prints
      node-0.log                   what Ray prints as it starts on a node
      token                        for the owner's eyes; removed at the end
      address, joined-1, …         how the nodes of an attempt find one another
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mambaflow.local_storage import LocalStorage


@dataclass(frozen=True)
class TaskFolder:
    """The folder of one command."""

    path: Path

    DONE: ClassVar[str] = "done.json"
    CANCELLED: ClassVar[str] = "cancelled"
    EXCLUDED: ClassVar[str] = "excluded"
    FAULTS: ClassVar[str] = "faults"
    TURNS: ClassVar[str] = "turns"
    ATTEMPTS: ClassVar[str] = "attempts"
    LOG: ClassVar[str] = "command.log"

    @property
    def files(self) -> LocalStorage:
        """Its files, which appear whole."""
        return LocalStorage(self.path)

    def exit_code(self) -> int | None:
        """How the command ended; None where it has not."""
        try:
            return int(json.loads(self.files.read(self.DONE))["code"])
        except FileNotFoundError:
            return None

    def finish(self, code: int, attempt: str, why: str = "") -> int:
        """Keep how the command ended, unless somebody was first; the code that counts."""
        text = json.dumps({"code": code, "attempt": attempt, "why": why}) + "\n"
        self.files.create(self.DONE, text.encode())
        kept = self.exit_code()
        return code if kept is None else kept

    def why(self) -> str:
        """What was said as the command ended, by us and not by the command."""
        try:
            return str(json.loads(self.files.read(self.DONE)).get("why", ""))
        except FileNotFoundError:
            return ""

    def attempts(self) -> list[Path]:
        """The folders of its attempts, the oldest first."""
        found = [p for p in (self.path / self.ATTEMPTS).glob("*") if p.is_dir()]
        return sorted(found, key=lambda p: p.stat().st_ctime_ns)

    def begun(self) -> bool:
        """Whether an attempt has started the command before."""
        return any((p / self.LOG).exists() for p in self.attempts())

    def fault(self, attempt: str, why: str, nodes: list[str]) -> int:
        """Note a failure that is not the command's, and the nodes to leave out; how many so far."""
        self.files.write(f"{self.FAULTS}/{attempt}", why.encode())
        if nodes:
            known = self.excluded()
            left_out = known + [n for n in nodes if n not in known]
            self.files.write(self.EXCLUDED, ",".join(left_out).encode())
        return len(self.files.list(f"{self.FAULTS}/"))

    def excluded(self) -> list[str]:
        try:
            text = self.files.read(self.EXCLUDED).decode()
        except FileNotFoundError:
            return []
        return [name for name in text.split(",") if name]


@dataclass(frozen=True)
class SubmissionFolder:
    """The folder of a submission."""

    path: Path

    CODE: ClassVar[str] = "code"
    RECORD: ClassVar[str] = "submission.json"
    SUBMITIT: ClassVar[str] = "submitit"
    TASKS: ClassVar[str] = "tasks"

    def make(self, exclude: str = "") -> None:
        """The folder, which must be new, for its owner alone."""
        self.path.mkdir(parents=True)
        self.path.chmod(0o700)

    def task(self, number: int) -> TaskFolder:
        return TaskFolder(self.path / self.TASKS / str(number))

    def write_record(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, indent=2) + "\n"
        LocalStorage(self.path).write(self.RECORD, text.encode())

    def record(self) -> dict[str, Any]:
        """What `write_record` wrote; FileNotFoundError where a submission did not come so far."""
        found: dict[str, Any] = json.loads((self.path / self.RECORD).read_bytes())
        return found


def submissions(folder: Path) -> list[SubmissionFolder]:
    """Those that were submitted, the oldest first."""
    found = folder.glob(f"*/{SubmissionFolder.RECORD}")
    return [SubmissionFolder(p.parent) for p in sorted(found, key=os.path.getmtime)]
