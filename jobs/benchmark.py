"""Measure the parts of mambaflow side by side, as ratios within one run.

    python jobs/benchmark.py --what scan         the scan against its rivals and the block's GEMMs
    python jobs/benchmark.py --what step         where a training step's time goes, and its floor
    python jobs/benchmark.py --what sample       posterior mean and samples
    python jobs/benchmark.py --what loader       making batches
    python jobs/benchmark.py --what memory       peak memory of a 256 x 256 query

Works on CPU and GPU; prints tables and writes JSON. Exit codes: 0 done, 2 bad input.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mambaflow.batches import Batches, Layout, PixelBatch
from mambaflow.config import ARCHITECTURES, TrainConfig, lookup, require
from mambaflow.model import VelocityField, parameters
from mambaflow.pixels import coordinates
from mambaflow.report import Table, provenance
from mambaflow.samplers import heun, mean, uniform_times
from mambaflow.shard_set import ShardSet
from mambaflow.ssm import Mamba, fastest, selective_scan
from mambaflow.training import TrainState, fit

Work = Callable[[], object]
MASKS: tuple[Literal["strict", "fresh"], ...] = ("strict", "fresh")
LOADED = 20  # batches in one round of `loader`


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure, and on what."""

    what: Literal["scan", "step", "sample", "loader", "memory"] = "scan"
    """The part to measure."""
    arch: str = "v2"
    """Architecture: v1 or v2."""
    batch_size: int = 16
    """Images in a batch."""
    queries: int = 204
    """Pixels asked for in training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of the matrix products."""
    device: str = "cpu"
    """cpu or cuda."""
    repeats: int = 7
    """Rounds; in each, every rival runs once, and medians are compared."""
    threads: int = 0
    """Threads of torch; 0: as many as it takes by itself."""
    data: str = "data/sample"
    """Staged shards that `loader` reads."""
    out: str = ""
    """Write the numbers here as JSON too."""

    def __post_init__(self) -> None:
        lookup(ARCHITECTURES, self.arch, "arch")
        for name in ("batch_size", "queries", "repeats"):
            value = getattr(self, name)
            require(value > 0, f"{name} (={value}) must be positive; use 1 or more")
        require(
            self.device == "cpu" or torch.cuda.is_available(),
            f"device (={self.device!r}) is not here: torch sees no GPU; use --device cpu",
        )


def race(rivals: dict[str, Work], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each rival; they take turns, so that drift of the machine hits all.

    Those that take over a second run in three rounds only.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for i in range(repeats + 1):
        for name, work in rivals.items():
            if i > 3 and times[name][-1] > 1:
                continue
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def against(times: dict[str, float], base: str) -> list[list[str]]:
    """Rows: rival, milliseconds, ratio to the base."""
    return [[k, f"{1e3 * v:.2f}", f"{v / times[base]:.3f}"] for k, v in times.items()]


def scan_inputs(config: BenchmarkConfig, n: int, d: int, s: int) -> list[Tensor]:
    """Tensors of the scan at the block's shape, requiring gradients."""
    torch.manual_seed(0)
    b = config.batch_size
    shapes = [(b, n, d), (b, n, d), (d, s), (b, n, s), (b, n, s), (d,), (b, n, d)]
    tensors = [torch.randn(shape, device=config.device) for shape in shapes]
    tensors[1] -= 3
    tensors[2] = -tensors[2].exp()
    return [x.requires_grad_() for x in tensors]


def block_gemms(block: Mamba, b: int, n: int) -> list[tuple[Tensor, nn.Linear]]:
    """The matrix products of a Mamba block and nothing else: inputs, and what multiplies them."""
    layers = [block.in_proj, block.x_proj, block.dt_proj, block.out_proj]
    device = block.D.device
    return [(torch.randn(b, n, m.in_features, device=device).requires_grad_(), m) for m in layers]


def backward(work: Callable[[], list[Tensor]], inputs: list[Tensor]) -> Work:
    """Forward and backward of a work, for the gradients of all inputs."""
    slopes = [torch.randn_like(y) for y in work()]
    return lambda: torch.autograd.grad(work(), inputs, slopes)


def pscan(inputs: list[Tensor]) -> Tensor:
    """mambapy's parallel scan of the same recurrence."""
    from mambapy.pscan import pscan as parallel

    u, dt, A, B, C, D, z = inputs
    dt = nn.functional.softplus(dt)
    h = parallel(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None])
    return ((h @ C[..., None])[..., 0] + D * u) * nn.functional.silu(z)


def measure_scan(config: BenchmarkConfig) -> list[Table]:
    """The scan at the V2 block's shape, forward and with backward."""
    model = ARCHITECTURES[config.arch]
    width, b, n = model.d_model, config.batch_size, 2 * config.queries
    block = Mamba(width, model.d_state, model.d_conv, model.expand).to(config.device)
    tokens = torch.randn(b, n, width, device=config.device, requires_grad=True)
    inputs = scan_inputs(config, n, width * model.expand, model.d_state)
    gemms = block_gemms(block, b, n)
    factors = [x for x, _ in gemms] + [layer.weight for _, layer in gemms]
    best = fastest(inputs[0], model.d_state)
    works: dict[str, tuple[Callable[[], list[Tensor]], list[Tensor]]] = {
        "block's matrix products": (lambda: [x @ m.weight.t() for x, m in gemms], factors),
        "whole block": (lambda: [block(tokens)], [tokens, *block.parameters()]),
    }
    for name in dict.fromkeys([best, "chunked", "reference"]):
        scan = lambda name=name: [selective_scan(*inputs, backend=name)]  # noqa: E731
        works[f"scan: {name}"] = (scan, inputs)
    forward: dict[str, Work] = {name: work for name, (work, _) in works.items()}
    forward["scan: mambapy pscan"] = lambda: pscan(inputs)
    both = {name: backward(work, given) for name, (work, given) in works.items()}
    with torch.no_grad():
        first = race(forward, config.repeats, config.device)
    second = race(both, config.repeats, config.device)
    shape = f"b {b}, n {n}, {width * model.expand} channels, {model.d_state} states"
    heading = ["work", "ms", "/ block's matrix products"]
    return [
        Table(heading, against(times, "block's matrix products"), f"{name}; {shape}")
        for name, times in (("forward", first), ("forward and backward", second))
    ]


def random_batch(config: BenchmarkConfig, queries: int, known: int = 204) -> PixelBatch:
    """A batch of made-up pixels."""
    torch.manual_seed(1)
    b = config.batch_size
    known_xy, xy = torch.rand(b, known, 2), torch.rand(b, queries, 2)
    rgb = [torch.rand(b, m, 3) * 2 - 1 for m in (known, queries)]
    return PixelBatch(known_xy, rgb[0], xy, rgb[1], torch.arange(b)).to(config.device)


class Fixed:
    """The same batch at every step."""

    def __init__(self, batch: PixelBatch) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> PixelBatch:
        return self.batch


def counted_flops(state: TrainState, batch: PixelBatch, config: BenchmarkConfig) -> int:
    """FLOPs of the matrix products and attentions of a step, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        next(iter(fit(state, Fixed(batch), step_config(config), state.step + 1)))
    return counter.get_total_flops()


def step_config(config: BenchmarkConfig) -> TrainConfig:
    """Training as the step benchmark does it."""
    return TrainConfig(batch_size=config.batch_size, precision=config.precision)


def measure_step(config: BenchmarkConfig) -> list[Table]:
    """A training step, its parts by profiler, and its floor: FLOPs over the GEMM rate."""
    from torch.profiler import ProfilerActivity, profile

    batch = random_batch(config, config.queries)
    state = TrainState(ARCHITECTURES[config.arch], step_config(config), torch.device(config.device))
    flops = counted_flops(state, batch, config)
    steps = fit(state, Fixed(batch), step_config(config), 10**9)
    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    a, b = (torch.randn(2048, 2048, device=config.device, dtype=kind) for _ in range(2))
    times = race(
        {"step": lambda: next(steps), "gemm": lambda: a @ b}, config.repeats, config.device
    )
    rate = 2 * 2048**3 / times["gemm"]
    floor = flops / rate
    rows = [
        ["samples/s", f"{config.batch_size / times['step']:.1f}"],
        ["step, ms", f"{1e3 * times['step']:.1f}"],
        ["FLOPs of a step, G", f"{flops / 1e9:.1f}"],
        ["GEMM rate, GFLOP/s", f"{rate / 1e9:.0f}"],
        ["floor, ms", f"{1e3 * floor:.1f}"],
        ["step / floor", f"{times['step'] / floor:.2f}"],
        ["parameters", f"{parameters(state.model):,}"],
    ]
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (config.device == "cuda")
    with profile(activities=kinds) as profiler:
        for _ in range(3):
            next(steps)
    events = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    top = sorted(events, key=lambda e: -e.self_cpu_time_total)[:14]
    where = [
        [
            e.key,
            f"{e.self_cpu_time_total / 3e3:.1f}",
            f"{100 * e.self_cpu_time_total / total:.1f} %",
        ]
        for e in top
    ]
    caption = (
        f"{config.arch}, batch {config.batch_size}, {config.queries} queries, {config.precision}"
    )
    return [
        Table(["training step", "value"], rows, caption),
        Table(["operation", "ms a step", "share"], where, "CPU time of the process, by operation"),
    ]


def measure_sample(config: BenchmarkConfig) -> list[Table]:
    """Completing whole images: 820 unknown pixels of 1,024."""
    model = VelocityField(ARCHITECTURES[config.arch]).to(config.device).eval()
    batch = random_batch(config, 820)
    noise = torch.randn_like(batch.query_rgb)

    def run(solve: Callable) -> Work:
        def work() -> None:
            with torch.no_grad():
                solve(model.given(batch))

        return work

    rivals = {"posterior mean (1 call)": run(lambda v: mean(v, noise))}
    for steps in (4, 16, 50):
        grid = uniform_times(steps)
        rivals[f"Heun, {steps} steps"] = run(lambda v, grid=grid: heun(v, noise, grid))
    times = race(rivals, config.repeats, config.device)
    rows = [[k, f"{v:.3f}", f"{config.batch_size / v:.1f}"] for k, v in times.items()]
    return [
        Table(
            ["solver", "s a batch", "images/s"], rows, f"{config.arch}, batch {config.batch_size}"
        )
    ]


def one_call(config: BenchmarkConfig, size: int) -> tuple[float, float]:
    """Seconds of one call for a size x size query, and this process's peak memory in GiB."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    model = VelocityField(ARCHITECTURES[config.arch]).to(config.device).eval()
    batch = random_batch(BenchmarkConfig(batch_size=1, device=config.device), size * size)
    noise = torch.randn_like(batch.query_rgb)
    start = time.perf_counter()
    with torch.no_grad():
        model.given(batch)(noise, torch.full((1,), 0.5, device=config.device))
    if config.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return time.perf_counter() - start, peak


def long_scan(config: BenchmarkConfig, n: int) -> float:
    """Seconds of the scan alone over n tokens of one image, at the block's width."""
    model = ARCHITECTURES[config.arch]
    one = BenchmarkConfig(batch_size=1, device=config.device)
    inputs = scan_inputs(one, n, model.d_model * model.expand, model.d_state)
    with torch.no_grad():
        works: dict[str, Work] = {"scan": lambda: selective_scan(*inputs)}
        return race(works, config.repeats, config.device)["scan"]


def measure_memory(config: BenchmarkConfig) -> list[Table]:
    """Peak memory and time of one call on growing grids, and the time of the scan on its own."""
    rows = []
    for size in (32, 64, 128, 256):  # a peak never falls: each size in a process of its own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            seconds, peak = fresh.submit(one_call, config, size).result()
        rows.append([f"{size} x {size}", f"{seconds:.2f}", f"{peak:.2f}"])
    scans = {n: long_scan(config, n) for n in (1024, 4096, 16384, 65536)}
    times = [[f"{n:,}", f"{1e3 * t:.2f}", f"{1e6 * t / n:.3f}"] for n, t in scans.items()]
    return [
        Table(["query", "s a call", "peak GiB"], rows, f"{config.arch}, 204 known pixels"),
        Table(["tokens", "ms", "µs a token"], times, f"{config.arch}: one scan, forward, b 1"),
    ]


def per_item(shards: ShardSet, queries: int, batch_size: int) -> Iterator[object]:
    """The usual way: torchvision's CIFAR10 items, a Dataset that picks each one's pixels, and a
    DataLoader with two workers; epochs without end."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import ToTensor

    rows = shards.rows(np.arange(len(shards)))
    if rows.images is None:
        raise ValueError(f"data (={shards.storage.uri}) must be staged with --full-images")
    known, size = shards.recipe.known, shards.recipe.size
    whole, labels = rows.images.reshape(-1, size, size, 3), rows.labels.tolist()

    class Images(CIFAR10):
        def __init__(self) -> None:  # its items, without its download
            self.data, self.targets = whole, labels
            self.transform, self.target_transform = ToTensor(), None

    class Sparse(Dataset):
        images = Images()

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            image, _ = self.images[i]
            chosen = torch.from_numpy(np.random.RandomState(42 + i).permutation(size * size))
            xy, rgb = coordinates(chosen, size), image.flatten(1).t()[chosen]
            return xy[:known], rgb[:known], xy[known:][:queries], rgb[known:][:queries]

    while True:
        yield from DataLoader(Sparse(), batch_size, shuffle=True, num_workers=2, drop_last=True)


def reading(batches: Batches) -> Work:
    """The next few batches, again and again."""
    step = count()
    return lambda: [batches[next(step)] for _ in range(LOADED)]


def measure_loader(config: BenchmarkConfig) -> list[Table]:
    """Batches from staged shards against the per-item way, and against what training takes."""
    shards = ShardSet(config.data, "train")
    layout, b = Layout.of(shards.recipe, ARCHITECTURES[config.arch]), config.batch_size
    usual = per_item(shards, config.queries, b)
    state = TrainState(ARCHITECTURES[config.arch], step_config(config), torch.device(config.device))
    training = fit(state, Fixed(random_batch(config, config.queries)), step_config(config), 10**9)
    rivals: dict[str, Work] = {"training step": lambda: next(training)}
    for masks in MASKS:
        batches = Batches(shards, layout, TrainConfig(batch_size=b, masks=masks))
        rivals[f"batches, {masks} masks"] = reading(batches)
    rivals["CIFAR10 + Dataset + DataLoader, 2 workers"] = lambda: [
        next(usual) for _ in range(LOADED)
    ]
    times = race(rivals, config.repeats, config.device)
    rates = {k: b * (1 if k == "training step" else LOADED) / v for k, v in times.items()}
    rows = [[k, f"{v:,.0f}", f"{v / rates['training step']:,.0f}"] for k, v in rates.items()]
    heading = ["what", "samples/s", "/ training"]
    return [
        Table(heading, rows, f"{config.arch}, batch {b}, {len(shards):,} images of {config.data}")
    ]


PARTS: dict[str, Callable[[BenchmarkConfig], list[Table]]] = {
    "scan": measure_scan,
    "step": measure_step,
    "sample": measure_sample,
    "loader": measure_loader,
    "memory": measure_memory,
}


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit code."""
    config = tyro.cli(BenchmarkConfig, args=argv, description=__doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        tables = PARTS[config.what](config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in tables:
        print(table)
    print(
        provenance(
            " ".join(["python", *sys.argv]),
            "made up",
            0,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
    )
    if config.out:
        found = [
            {"heading": list(t.heading), "rows": [list(r) for r in t.rows], "caption": t.caption}
            for t in tables
        ]
        Path(config.out).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
