"""A training step against that of the reference repository, which is imported from a checkout.

Its own loop runs as it is: it takes its batches from a loader that gives one when it is the
reference's turn, and lets our step run when it is ours. Nothing of that repository is copied here.
"""

import contextlib
import hashlib
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mambaflow.benchmarks.bench import (
    REFERENCE,
    REFERENCE_URL,
    BenchmarkConfig,
    Fixed,
    Work,
    medians,
    random_batch,
    step_config,
    turns,
)
from mambaflow.config import ARCHITECTURES
from mambaflow.data.batches import PixelBatch
from mambaflow.models.velocity_field import parameters
from mambaflow.report.tables import Table
from mambaflow.training.loop import TrainState, fit

# What their modules call the model and the loop.
MODEL = {"v1": "MAMBADiffusion", "v2": "MAMBADiffusionV2"}
TRAIN = "train_flow_matching"
FRESH = f"a fresh `git clone {REFERENCE_URL}`"
THEIRS = "reference"


@contextlib.contextmanager
def guest(folder: Path) -> Iterator[None]:
    """Imports that leave no trace: the search path, to which these scripts add, the modules and the
    folder are as before, so that `core` of one checkout is not taken for that of the next."""
    # No bytecode either: the checkout stays as it was.
    path, known, silent = sys.path[:], set(sys.modules), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, silent
        # Of the new modules only theirs: torch's and others' stay loaded.
        for name in sys.modules.keys() - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


def load(folder: Path, arch: str) -> tuple[Callable[..., nn.Module], Callable[..., object]]:
    """The reference's model and its training loop.

    Raises:
        ValueError: they cannot be imported, or are called otherwise.
    """
    # By its file, under a name of our own, so that it is in nobody's way.
    spec = importlib.util.spec_from_file_location(f"reference_{arch}", folder / REFERENCE[arch])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with guest(folder):
        try:
            spec.loader.exec_module(module)
            return getattr(module, MODEL[arch]), getattr(module, TRAIN)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"reference (={str(folder)!r}) must give {MODEL[arch]} and {TRAIN} in "
                f"{REFERENCE[arch]}, but {error}; use {FRESH} and install its requirements.txt"
            ) from error


def version(folder: Path, arch: str) -> str:
    """The commit of a checkout, marked if files were changed; else the training module's sha256."""
    # The checkout's own repository and not one around it, where the folder is a copy without .git.
    # --exclude=* names the commit, never a tag.
    git = ["git", f"--git-dir={folder / '.git'}", f"--work-tree={folder}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return f"commit {said.stdout.strip()}"
    digest = hashlib.sha256((folder / REFERENCE[arch]).read_bytes()).hexdigest()
    return f"{REFERENCE[arch]} of sha256 {digest[:12]}"


class Over(Exception):
    """The race is over: the way out of a loop that would train for a thousand epochs."""


class Loader:
    """The reference's data loader, which holds the race: its loop asks for a batch when its step
    is done, and our step runs before the answer. So both run in one thread, with the same pool of
    OpenMP's threads."""

    def __init__(self, batch: PixelBatch, ours: dict[str, Work], config: BenchmarkConfig) -> None:
        # Theirs first in a round: its loop waits for a batch by then.
        self.times: dict[str, list[float]] = {name: [] for name in (THEIRS, *ours)}
        self._batch, self._ours, self._config = as_theirs(batch), ours, config

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield self._batch  # outside the race: the loop begins by taking one for its pictures
        # A turn of theirs lasts from the batch that is given to the next one that is asked for,
        # which is their step. In ours their loop stands still in its `for`.
        for name in turns(self.times, self._config.repeats, self._config.device):
            if name == THEIRS:
                yield self._batch
            else:
                self._ours[name]()
        # To return would end an epoch of theirs, and the next would begin.
        raise Over


def as_theirs(batch: PixelBatch) -> dict[str, Tensor]:
    """A batch as the reference's data set gives it: colours from 0 to 1."""
    # What it does not train on is there in shape alone.
    (b, known), asked = batch.known_xy.shape[:2], batch.query_xy.shape[1]
    pictures = {
        "full_image": torch.zeros(b, 3, 32, 32),
        "input_indices": torch.arange(known).expand(b, -1),
        "output_indices": torch.arange(asked).expand(b, -1),
    }
    return pictures | {
        "input_coords": batch.known_xy,
        # Ours are from -1 to 1.
        "input_values": (batch.known_rgb + 1) / 2,
        "output_coords": batch.query_xy,
        "output_values": (batch.query_rgb + 1) / 2,
    }


def measure(config: BenchmarkConfig) -> list[Table]:
    """A training step of the reference's loop and one of ours, in turns.

    Raises:
        RuntimeError: the reference's loop ended by itself.
    """
    folder = Path(config.reference).resolve()
    batch = random_batch(config, config.queries)
    state = TrainState(ARCHITECTURES[config.arch], step_config(config), torch.device(config.device))
    # More steps than any race asks for.
    steps = fit(state, Fixed(batch), step_config(config), 10**9)
    ours = f"ours, {config.precision}"
    loader = Loader(batch, {ours: lambda: next(steps)}, config)
    with (
        contextlib.redirect_stdout(io.StringIO()),  # it tells of itself as it begins
        tempfile.TemporaryDirectory(prefix="mambaflow-") as log,
        contextlib.suppress(Over),
    ):
        # Its defaults are its own: model, optimiser, precision.
        build, train = load(folder, config.arch)
        model = build().to(config.device)
        train(model, loader, None, device=config.device, save_dir=log)
        # Reached only where the loop ended without Over.
        raise RuntimeError(f"{TRAIN} of {folder} ended before the race; use {FRESH}")
    # The models differ in size, and so their parameters are in the table.
    times, sizes = medians(loader.times), {THEIRS: parameters(model), ours: parameters(state.model)}
    rows = [
        [name, f"{sizes[name]:,}", f"{1e3 * seconds:.1f}", f"{config.batch_size / seconds:.2f}",
         f"{times[THEIRS] / seconds:.2f}"]
        for name, seconds in times.items()
    ]  # fmt: skip
    caption = (
        f"{config.arch}, batch {config.batch_size}, {batch.known_xy.shape[1]} known pixels, "
        f"{config.queries} queries; reference: {version(folder, config.arch)}, its own loop and "
        "defaults, fp32"
    )
    heading = ["implementation", "parameters", "ms a step", "samples/s", "/ reference"]
    return [Table(heading, rows, caption)]
