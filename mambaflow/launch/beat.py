"""Whether somebody on another node is still there: a file that changes while he is.

Only a shared folder joins the nodes. Clocks of other nodes are not trusted: who watches measures by
its own how long a file has stayed the same.
"""

import secrets
import time
from pathlib import Path

from mambaflow.local_storage import LocalStorage
from mambaflow.variables import seconds

BEAT_S = 2.0
SILENCE_S = 30.0  # a file server may show what was written up to this late


def longest_silence_s() -> float:
    """Seconds of silence after which a node is taken for lost.

    Raises:
        ValueError: MAMBAFLOW_SILENCE_S is no number of at least 5.
    """
    return seconds("MAMBAFLOW_SILENCE_S", SILENCE_S)


class Beat:
    """Our own sign of life."""

    def __init__(self, path: Path) -> None:
        self.folder, self.name = LocalStorage(path.parent), path.name
        self._count, self._last = 0, -BEAT_S

    def tick(self) -> None:
        """Give it, if it is time."""
        now = time.monotonic()
        if now - self._last >= BEAT_S:
            self._count, self._last = self._count + 1, now
            self.folder.write(self.name, str(self._count).encode())


class Watch:
    """Another's sign of life."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text, self._changed = b"", time.monotonic()

    def silent_s(self) -> float:
        """Seconds since it last changed, as far as we have seen; opened anew, since only that has a
        network file system look at its server."""
        try:
            text = self.path.read_bytes()
        except OSError:
            text = b""
        now = time.monotonic()
        if text and text != self._text:
            self._text, self._changed = text, now
        return now - self._changed


def age_s(path: Path) -> float:
    """Seconds since a file was written, by the clock of the server that keeps it."""
    mark = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    mark.touch()
    try:
        return mark.stat().st_mtime - path.stat().st_mtime
    finally:
        mark.unlink(missing_ok=True)
