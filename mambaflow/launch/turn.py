"""Whose turn it is to run the command: of two attempts that the scheduler started, one's.

A scheduler may start a job twice (it was killed before it had saved that the job runs), and a node
that was given up may still be there. Turns are numbered; each is taken by one attempt alone, and
the highest counts. Who finds a higher one than its own has been given up, and ends. An owner of
`mambaflow.lease` refuses others at once; here they wait, since theirs may come.
"""

import time
from collections.abc import Callable
from pathlib import Path

from mambaflow.launch.beat import Beat, Watch, age_s, longest_silence_s
from mambaflow.launch.task_folder import TaskFolder
from mambaflow.local_storage import LocalStorage

LOOK_S = 0.5


class Turn:
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
    """The number of the newest turn; 0 for none."""
    return max((int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()), default=0)


def take(task: TaskFolder, attempt: str, go_on: Callable[[], bool]) -> Turn | None:
    """A turn, once nobody else who has one lives; None where the command is done, or `go_on` says
    no."""
    folder = task.path / task.TURNS
    watched, watch = 0, Watch(folder / "none")
    while go_on() and task.exit_code() is None:
        number = newest(folder)
        if number != watched:
            watched, watch = number, Watch(folder / f"{number:06d}.beat")
        if number == 0 or _free(folder, number, watch):
            if LocalStorage(folder).create(f"{number + 1:06d}", attempt.encode()):
                turn = Turn(folder, number + 1)
                turn.beat.tick()
                return turn
            continue
        time.sleep(LOOK_S)
    return None


def _free(folder: Path, number: int, watch: Watch) -> bool:
    """Whether whose turn it is has ended, or is silent."""
    if (folder / f"{number:06d}.ended").exists():
        return True
    # Long ago by the server's clock: no need to wait and see.
    beat = folder / f"{number:06d}.beat"
    if beat.exists() and age_s(beat) > 2 * longest_silence_s():
        return True
    return watch.silent_s() > longest_silence_s()
