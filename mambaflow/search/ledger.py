"""The ledger of a sweep: a list of events to which one driver appends, and the truth about it.

    ledger/0001.jsonl     a line for each event that the first driver saw
    ledger/0002.jsonl     those of the driver that went on after it

S3 cannot append, so that a driver has a file of its own, which it writes whole at every event: a
few hundred bytes for each event before. A file is created by one driver alone, and whoever finds a
later one than its own has been replaced, and stops.
"""

import json
import logging
import re
import time
from typing import Any

from mambaflow.checks import require
from mambaflow.storage_base import Storage

FOLDER = "ledger/"
KEY = rf"{FOLDER}\d+\.jsonl"
Event = dict[str, Any]
"""`event`, what happened; `time`, seconds since 1970; the rest hangs on what happened."""
log = logging.getLogger(__name__)


class ReplacedError(RuntimeError):
    """Another driver has taken the sweep over."""


class Ledger:
    """The events of a sweep, and a place to append them.

    Args:
        storage: the sweep's folder.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._mine: list[Event] = []
        self._number = 0

    def events(self) -> list[Event]:
        """Everything that has happened, oldest first.

        Raises:
            ValueError: a line that is no event; the message names the file.
        """
        return [event for key in self._files() for event in self._read(key)]

    def open(self) -> None:
        """Begin a file of our own, after which no other driver's counts.

        Raises:
            ReplacedError: another driver has done so at the same moment.
        """
        # Empty at first, so that of two drivers one creates it before either has written.
        number = max(map(_number, self._files()), default=0) + 1
        if not self.storage.create(_key(number), b""):
            raise ReplacedError(f"{self.storage.uri} is taken over by another driver; let it run")
        self._number, self._mine = number, []

    def append(self, what: str, **values: Any) -> Event:
        """Add an event; it is in storage when this returns.

        Raises:
            ReplacedError: another driver has opened the ledger since; nothing was written.
        """
        require(self._number > 0, "a ledger must be opened before it is written; call open()")
        if self.storage.exists(_key(self._number + 1)):
            raise ReplacedError(
                f"{self.storage.uri} was taken over by another driver: this one ends"
            )
        event = {"event": what, "time": time.time(), **values}
        self._mine.append(event)
        # Python's JSON writes a float so that it is read back with the same bits.
        lines = "".join(json.dumps(one) + "\n" for one in self._mine)
        self.storage.write(_key(self._number), lines.encode())
        return event

    def _files(self) -> list[str]:
        # By their whole names: a copy that somebody made of one would count twice.
        return [key for key in self.storage.list(FOLDER) if re.fullmatch(KEY, key)]

    def _read(self, key: str) -> list[Event]:
        found = []
        for number, line in enumerate(self.storage.read(key).decode().splitlines(), 1):
            try:
                event = json.loads(line)
                event["event"], event["time"]  # noqa: B018
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.storage.uri}/{key}:{number} (={line[:60]!r}) must be an event: "
                    f"{error!r}; mend or remove the line"
                ) from error
            found.append(event)
        return found


def _number(key: str) -> int:
    return int(key.removeprefix(FOLDER).removesuffix(".jsonl"))


def _key(number: int) -> str:
    # Four digits, so that a listing by name is one by age.
    return f"{FOLDER}{number:04d}.jsonl"
