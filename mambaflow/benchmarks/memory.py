"""Peak memory and time of one call as its grid grows."""

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from mambaflow.benchmarks.bench import BenchmarkConfig, Work, race, random_batch
from mambaflow.benchmarks.scan import scan_inputs
from mambaflow.config import ARCHITECTURES
from mambaflow.models.selective_scan import selective_scan
from mambaflow.models.velocity_field import VelocityField
from mambaflow.report.tables import Table


def one_call(config: BenchmarkConfig, size: int, t: float) -> tuple[float, float]:
    """Seconds of one call for a size x size query, and this process's peak memory in GiB."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    # `keep_memory` is not called here: a query is measured as a user's process has it.
    model = VelocityField(ARCHITECTURES[config.arch]).to(config.device).eval()
    batch = random_batch(BenchmarkConfig(batch_size=1, device=config.device), size * size)
    noise = torch.randn_like(batch.query_rgb)
    # The first call of its process, with all that is done once, such as loading the kernels.
    start = time.perf_counter()
    with torch.no_grad():
        model.condition(batch)(noise, torch.full((1,), t, device=config.device))
    if config.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30
    # Of all that the process ever held, Python and torch as well; Linux counts it in KiB.
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


def measure(config: BenchmarkConfig) -> list[Table]:
    """Peak memory and time of one call on growing grids, and the time of the scan on its own."""
    rows = []
    for size in (32, 64, 128, 256):
        row = [f"{size} x {size}"]
        for t in (0.0, 0.5):  # a peak never falls: each in a process of its own
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                seconds, peak = fresh.submit(one_call, config, size, t).result()
            row += [f"{seconds:.2f}", f"{peak:.2f}"]
        rows.append(row)
    # After the queries: a process that is started begins with the peak of its parent (on Linux,
    # ru_maxrss goes through exec), and these make this one large.
    scans = {n: long_scan(config, n) for n in (1024, 4096, 16384, 65536)}
    times = [[f"{n:,}", f"{1e3 * t:.2f}", f"{1e6 * t / n:.3f}"] for n, t in scans.items()]
    heading = ["query", "posterior mean, s", "peak GiB", "a call of a sampler, s", "peak GiB"]
    return [
        Table(heading, rows, f"{config.arch}, 204 known pixels"),
        Table(["tokens", "ms", "µs a token"], times, f"{config.arch}: one scan, forward, b 1"),
    ]
