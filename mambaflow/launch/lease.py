"""Which attempt may run the command: of two that the scheduler started, one.

A scheduler may start a job twice (it was killed before it had saved that the job runs), and a node
that was given up may still be there. Leases are numbered; each is created by one attempt alone, and
the highest counts. Who finds a higher one than its own has been given up, and ends.
"""

import time
from collections.abc import Callable
from pathlib import Path

from mambaflow.launch.beat import Beat, Watch, age_s, lease_s
from mambaflow.launch.task_folder import TaskFolder
from mambaflow.storage import LocalStorage

LOOK_S = 0.5


class Lease:
    """The right to run a command, while nobody has a newer one."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.beat = Beat(folder / f"{number:06d}.beat")

    def held(self) -> bool:
        """Whether it is still ours; also says that we live."""
        if newest(self.folder) != self.number:
            return False
        self.beat.tick()
        return True

    def give_back(self) -> None:
        """The next attempt need not wait until we are silent."""
        LocalStorage(self.folder).write(f"{self.number:06d}.ended", b"ended")


def newest(folder: Path) -> int:
    """The number of the newest lease; 0 for none."""
    return max((int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()), default=0)


def take(task: TaskFolder, attempt: str, go_on: Callable[[], bool]) -> Lease | None:
    """A lease, once nobody else who has one lives; None where the command is done, or `go_on` says
    no."""
    folder = task.path / task.LEASES
    watched, watch = 0, Watch(folder / "none")
    while go_on() and task.exit_code() is None:
        number = newest(folder)
        if number != watched:
            watched, watch = number, Watch(folder / f"{number:06d}.beat")
        if number == 0 or _free(folder, number, watch):
            if LocalStorage(folder).create(f"{number + 1:06d}", attempt.encode()):
                lease = Lease(folder, number + 1)
                lease.beat.tick()
                return lease
            continue
        time.sleep(LOOK_S)
    return None


def _free(folder: Path, number: int, watch: Watch) -> bool:
    """Whether who has the lease has ended, or is silent."""
    if (folder / f"{number:06d}.ended").exists():
        return True
    # Long ago by the server's clock: no need to wait and see.
    beat = folder / f"{number:06d}.beat"
    if beat.exists() and age_s(beat) > 2 * lease_s():
        return True
    return watch.silent_s() > lease_s()
