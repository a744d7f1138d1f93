"""Where the time of a training step goes, and the floor under it."""

import torch

from mambaflow.batches import PixelBatch
from mambaflow.benchmarks.bench import BenchmarkConfig, Fixed, race, random_batch, step_config
from mambaflow.config import ARCHITECTURES
from mambaflow.model import parameters
from mambaflow.report import Table
from mambaflow.training import TrainState, compiled, fit


def counted_flops(state: TrainState, batch: PixelBatch, config: BenchmarkConfig) -> int:
    """FLOPs of the matrix products and attentions of a step, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        next(iter(fit(state, Fixed(batch), step_config(config), state.step + 1)))
    return counter.get_total_flops()


def measure(config: BenchmarkConfig) -> list[Table]:
    """A training step, its parts by profiler, and its floor: FLOPs over the GEMM rate."""
    from torch.profiler import ProfilerActivity, profile

    batch = random_batch(config, config.queries)
    state = TrainState(ARCHITECTURES[config.arch], step_config(config), torch.device(config.device))
    flops = counted_flops(state, batch, config)
    forward = compiled(state.model, config.compile)
    steps = fit(state, Fixed(batch), step_config(config), 10**9, forward)
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
        f"{config.arch}, batch {config.batch_size}, {config.queries} queries, {config.precision}, "
        f"compile {config.compile}"
    )
    return [
        Table(["training step", "value"], rows, caption),
        Table(["operation", "ms a step", "share"], where, "CPU time of the process, by operation"),
    ]
