"""The curves and pictures of a run, wherever the run is kept."""

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mambaflow.disk import room_for
from mambaflow.run_paths import RunPaths
from mambaflow.storage_base import Storage

Number = int | float
# Where TensorBoard shows a number that is not shown under its own name; "" is nowhere. It sorts its
# cards by name and opens on the first of them: these names put the loss first, then validation.
CARDS = {
    # An error of a mean, and what is the same at every step: the table at the end has them.
    r"val/.+_(se|truth)": "",
    r"val/(spread_.+)": r"val_spread/\1",
    r"val/(.*speckle|spread|coherence)": r"val_texture/\1",
    r"train/(?!loss)(.+)": r"watch/\1",
    r"law/(.+)": r"watch_law/\1",
}
log = logging.getLogger(__name__)


class RunLog:
    """The curves of a run, as TensorBoard events and as lines of metrics.jsonl.

    A run that goes on after step s drops what an earlier, interrupted try logged beyond s, so
    that every step is there once; after 0 there is nothing to keep.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        with room_for(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / RunPaths.METRICS
            if path.exists():
                _keep_until(path, step)
            # Unbuffered: a kill of the process costs no line, and a full disk is met at once.
            self._lines = path.open("ab", buffering=0)
            # TensorBoard drops what earlier files have at purge_step and beyond. After 0 that is
            # step 0 too: a run that was lost before its first checkpoint logs all anew.
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def scalars(self, step: int, values: Mapping[str, Number]) -> None:
        """The next points of curves: a line of metrics.jsonl, and TensorBoard's cards (see
        CARDS)."""
        self.line(step, values)
        with room_for(self.folder):
            for tag, value in values.items():
                if shown := card(tag):
                    self._writer.add_scalar(shown, value, step)

    def line(self, step: int, values: Mapping[str, Number]) -> None:
        """One line of metrics.jsonl alone, with the step, the wall time and the values as they are:
        of numbers that come once, and are no curves."""
        line = {"step": step, "time": time.time(), **values}
        with room_for(self.folder / RunPaths.METRICS):
            _append(self._lines, (json.dumps(line) + "\n").encode())

    def image(self, step: int, tag: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture in TensorBoard, after the curves of validation."""
        with room_for(self.folder):
            self._writer.add_image(f"view/{tag}", image, step, dataformats="HWC")

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A text in TensorBoard, such as a table."""
        with room_for(self.folder):
            self._writer.add_text(tag, markdown, step)

    def hparams(self, settings: Mapping[str, Any], curves: Sequence[str]) -> None:
        """A row of TensorBoard's table of runs: settings, and the newest points of some curves.

        TensorBoard takes the columns from one of the runs that it shows: all should have the same.
        """
        # TensorBoard raises for all others, None among them.
        plain = {
            name: x if isinstance(x, bool | int | float | str) else repr(x)
            for name, x in settings.items()
        }
        # One level below the SummaryWriter, which cannot add a summary as it is.
        events: Any = self._writer.file_writer
        with room_for(self.folder):
            for summary in hparams(plain, dict.fromkeys(curves)):
                events.add_summary(summary)  # SummaryWriter.add_hparams would open a sub-run

    def flush(self) -> None:
        """Everything logged so far is in the files."""
        with room_for(self.folder):
            self._writer.flush()

    def close(self) -> None:
        """Flush and end; a second close does nothing."""
        self._lines.close()
        with room_for(self.folder):
            self._writer.close()


def _append(file: FileIO, data: bytes) -> None:
    """Add to a file all or nothing."""
    end = os.fstat(file.fileno()).st_size
    try:
        left = memoryview(data)
        while left:
            # A disk takes what it has room for, and says at the next that it is full.
            left = left[file.write(left) :]
    except OSError:
        file.truncate(end)
        raise


def card(tag: str) -> str:
    """What TensorBoard calls a number; "" for one that it does not show."""
    for pattern, shown in CARDS.items():
        if found := re.fullmatch(pattern, tag):
            return found.expand(shown)
    return tag


def _keep_until(path: Path, step: int) -> None:
    """Rewrite the lines up to `step`; the last line may be torn by a kill, no other."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            logged = json.loads(line)["step"]
        # A TypeError: the line is JSON, and no object.
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            # No kill does that: somebody edited the file, and can mend it.
            if number < len(lines):
                raise ValueError(
                    f"{path}:{number} (={line[:60]!r}) must be a JSON object with a step; "
                    "mend or remove the line"
                ) from error
            log.warning("%s:%d: dropped a torn last line %r", path, number, line[:60])
            continue
        if step and logged <= step:
            kept.append(line + "\n")
    # Whole under another name first: a kill in between leaves the file as it was.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def logged(run: Storage) -> list[dict[str, Any]]:
    """The lines that a run has logged so far; none where there is no log.

    Raises:
        ValueError: a line that is no JSON, the last apart, which a kill may have torn.
    """
    if not run.exists(RunPaths.METRICS):
        return []
    lines = run.read(RunPaths.METRICS).decode().splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(
                    f"{run.uri}/{RunPaths.METRICS}:{number} (={line[:60]!r}) must be JSON; mend or "
                    "remove the line"
                ) from error
    return found


class StoredRunLog(RunLog):
    """A RunLog in a run's folder, or, when the run is in S3, in a scratch folder: TensorBoard's
    writer knows local files alone, so that `push` copies them there."""

    def __init__(self, run: Storage, step: int) -> None:
        self._run, self._scratch = run, None if run.is_local else _scratch_copy(run)
        super().__init__(Path(self._scratch.name) if self._scratch else run.path, step)

    def push(self) -> None:
        """Make everything logged so far last."""
        self.flush()
        if self._scratch is None:
            return
        folder = Path(self._scratch.name)
        # Each as a whole, every time: S3 cannot append.
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self._run.upload(file, file.relative_to(folder).as_posix())

    def close(self, push: bool = True) -> None:
        """Push, unless what is in the run's folder is somebody else's by now, and give the scratch
        folder back; a second close does nothing."""
        if self._lines.closed:
            return
        try:
            if push:
                self.push()
            super().close()
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()


def _scratch_copy(run: Storage) -> tempfile.TemporaryDirectory:
    """A folder with the curves that the run has so far, to go on with."""
    scratch = tempfile.TemporaryDirectory(prefix="mambaflow-")
    # The lines alone, which are rewritten. Event files of earlier tries stay where they are: the
    # new one has a name of its own, and says what TensorBoard is to drop of theirs.
    if run.exists(RunPaths.METRICS):
        run.download(RunPaths.METRICS, Path(scratch.name) / RunPaths.METRICS)
    return scratch
