"""What every measurement shares: its settings, made-up input, and a race in turns."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mambaflow.checks import lookup, require
from mambaflow.config import ARCHITECTURES, TrainConfig
from mambaflow.data.batches import PixelBatch

Work = Callable[[], object]

REFERENCE_URL = "https://github.com/colpark/MambaFlowMatching"
REFERENCE = {
    "v1": "v1/training/train_mamba_standalone.py",
    "v2": "v2/training/train_mamba_v2.py",
}
"""Where that repository trains each architecture."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure, and on what."""

    what: Literal[
        "scan", "attention", "step", "sample", "loader", "stall", "memory", "ray",
        "reference", "scale",
    ] = "scan"  # fmt: skip
    """The part to measure."""
    arch: str = "v2"
    """Architecture: v1 or v2."""
    batch_size: int = 16
    """Images in a batch."""
    queries: int = 204
    """Pixels asked for in training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of the matrix products."""
    compile: Literal["off", "on", "graphs"] = "off"
    """torch.compile of the network in `step`, as in training."""
    device: str = "cpu"
    """cpu or cuda."""
    repeats: int = 7
    """Rounds; in each, every rival runs once, and medians are compared (slow ones: three)."""
    threads: int = 0
    """Threads of torch; 0: as many as it takes by itself."""
    keep_memory: bool = True
    """The allocator keeps memory that it is given back, as in training; off: as torch has it."""
    sizes: tuple[int, ...] = (32, 64)
    """Sides of the images that `sample` completes."""
    steps: int = 8
    """Intervals of every sampler in `sample`."""
    data: str = "data/sample"
    """Staged shards that `loader`, `stall`, `ray` and `scale` read."""
    storage: str = ""
    """Where `scale` writes a checkpoint and removes it: a folder or s3://…; empty: here."""
    gpus: tuple[int, ...] = (8, 64, 1024)
    """Numbers of GPUs that `scale` reckons for."""
    gpus_per_node: int = 8
    """GPUs of a node in `scale`."""
    trials: int = 24
    """Trials of the sweep in `scale`."""
    epochs: int = 50
    """Epochs of each trial in `scale`."""
    reference: str = ""
    """Checkout of github.com/colpark/MambaFlowMatching that `reference` races; its code is run."""
    out: str = ""
    """Write the numbers here as JSON too."""

    def __post_init__(self) -> None:
        lookup(ARCHITECTURES, self.arch, "arch")
        positive = (
            "batch_size",
            "queries",
            "repeats",
            "steps",
            "gpus_per_node",
            "trials",
            "epochs",
        )
        for name in positive:
            value = getattr(self, name)
            require(value > 0, f"{name} (={value}) must be positive; use 1 or more")
        require(
            bool(self.gpus) and min(self.gpus) > 0,
            f"gpus (={self.gpus}) must be positive numbers; use 8 64 1024",
        )
        require(
            self.device == "cpu" or torch.cuda.is_available(),
            f"device (={self.device!r}) is not here: torch sees no GPU; use --device cpu",
        )
        require(
            self.compile == "off" or self.what == "step",
            f"compile (={self.compile!r}) is for --what step; leave it out with {self.what}",
        )
        require(
            self.compile != "graphs" or self.device == "cuda",
            "compile (='graphs') needs a GPU; use --device cuda, or --compile on",
        )
        # The file that will be run, not only the folder.
        training = Path(self.reference) / REFERENCE[self.arch]
        require(
            self.what != "reference" or (bool(self.reference) and training.is_file()),
            f"reference (={self.reference!r}) must be a folder with {REFERENCE[self.arch]}; run "
            f"`git clone {REFERENCE_URL}` and use --reference MambaFlowMatching",
        )


def turns(times: dict[str, list[float]], repeats: int, device: str) -> Iterator[str]:
    """Whose turn it is; notes in `times` how long each took until the next was asked for.

    Those that take over a second run in three rounds only.
    """
    # Round after round, and in each of them every rival once: when the machine slows down, it does
    # so for all.
    for i in range(repeats + 1):
        for name, found in times.items():
            # Three timed rounds are enough for a median where each takes over a second.
            if i > 3 and found[-1] > 1:
                continue
            # A generator stands still at its yield until the next turn is asked for: what lies
            # between is the rival's work.
            start = time.perf_counter()
            yield name
            # Kernels are only queued when a call returns; the clock stops when they are done. The
            # next rival begins with an idle GPU.
            if device == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                found.append(time.perf_counter() - start)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each rival."""
    # Medians: a round in which the machine did something else moves a mean, and not them.
    return {name: statistics.median(t) for name, t in times.items()}


def race(rivals: dict[str, Work], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each rival; they take turns, so that drift of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for name in turns(times, repeats, device):
        rivals[name]()
    return medians(times)


def against(times: dict[str, float], base: str) -> list[list[str]]:
    """Rows: rival, milliseconds, ratio to the base."""
    return [[k, f"{1e3 * v:.2f}", f"{v / times[base]:.3f}"] for k, v in times.items()]


def device_name(device: str) -> str:
    """What a table's caption says of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def random_batch(config: BenchmarkConfig, queries: int, known: int = 204) -> PixelBatch:
    """A batch of made-up pixels."""
    # The same numbers at every call, whatever was drawn before.
    torch.manual_seed(1)
    # Places anywhere, colours anywhere: the time of a step does not hang on them. As many known
    # pixels as an image of 32 x 32 has, a fifth.
    b = config.batch_size
    known_xy, xy = torch.rand(b, known, 2), torch.rand(b, queries, 2)
    rgb = [torch.rand(b, m, 3) * 2 - 1 for m in (known, queries)]
    # Samples 0 to b - 1 of the stream, so that noise and times are drawn as in training.
    return PixelBatch(known_xy, rgb[0], xy, rgb[1], torch.arange(b)).to(config.device)


class Fixed:
    """The same batch at every step."""

    def __init__(self, batch: PixelBatch) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> PixelBatch:
        return self.batch


def step_config(config: BenchmarkConfig) -> TrainConfig:
    """Training as the step benchmark does it."""
    return TrainConfig(batch_size=config.batch_size, precision=config.precision)
