"""Where the time of a training step goes, and the floor under it."""

from collections import Counter
from collections.abc import Iterator

import torch

from mambaflow.benchmarks.bench import (
    BenchmarkConfig,
    Fixed,
    Work,
    device_name,
    race,
    random_batch,
    step_config,
)
from mambaflow.config import ARCHITECTURES
from mambaflow.kernels.linear import large, linear_forward
from mambaflow.models.velocity_field import parameters
from mambaflow.report.tables import Table
from mambaflow.training.flops import step_flops
from mambaflow.training.loop import StepResult, TrainState, compiled, fit
from mambaflow.training.objective import Objective

PROFILED, SHOWN = 3, 14  # steps, and operations of them


def products(config: BenchmarkConfig) -> tuple[dict[str, Work], int]:
    """Products of two large matrices, and their FLOPs: torch's own, and where it is another on
    this machine, that of our layers. The faster is the floor's."""
    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    side = 8192 if config.device == "cuda" else 2048  # a GPU does 2048 in the time of a launch
    a, b = (torch.randn(side, side, device=config.device, dtype=kind) for _ in range(2))
    works: dict[str, Work] = {"torch's product": lambda: a @ b}
    if large(a, b):
        works["oneDNN's product"] = lambda: linear_forward(a, b, None)
    return works, 2 * side**3


def measure(config: BenchmarkConfig) -> list[Table]:
    """A training step, its parts by profiler, and its floor: FLOPs over the GEMM rate."""
    batch = random_batch(config, config.queries)
    model, train = ARCHITECTURES[config.arch], step_config(config)
    flops = step_flops(model, train, batch.known_xy.shape[1], config.queries)
    state = TrainState(model, train, torch.device(config.device))
    forward = compiled(Objective(state.model, train), config.compile)
    # The race's first round warms up: compiling is in it.
    steps = fit(state, Fixed(batch), train, 10**9, forward)
    rivals, size = products(config)
    times = race({"step": lambda: next(steps)} | rivals, config.repeats, config.device)
    # The faster rate makes the floor: what a step would take if it were products alone.
    rate, best = max((size / times[name], name) for name in rivals)
    rows = [
        ["samples/s", f"{config.batch_size / times['step']:.1f}"],
        ["step, ms", f"{1e3 * times['step']:.1f}"],
        ["FLOPs of a step, G", f"{flops / 1e9:.1f}"],
        *[[f"GFLOP/s of {name}", f"{size / times[name] / 1e9:.0f}"] for name in rivals],
        [f"floor by {best}, ms", f"{1e3 * flops / rate:.1f}"],
        ["step / floor", f"{times['step'] * rate / flops:.2f}"],
        ["parameters", f"{parameters(state.model):,}"],
    ]
    caption = (
        f"{config.arch}, batch {config.batch_size}, {config.queries} queries, {config.precision}, "
        f"compile {config.compile}, on {device_name(config.device)}"
    )
    return [Table(["training step", "value"], rows, caption), by_operation(steps, config.device)]


def by_operation(steps: Iterator[StepResult], device: str) -> Table:
    """Where the time of a step goes: of the CPU, or of the GPU where it has one."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    # After the race: a profiler slows down what it looks at.
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as profiler:
        for _ in range(PROFILED):
            next(steps)
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        # Time of an operation itself, without that of those it calls: no time is counted twice.
        if device != "cuda":
            spent[event.key] += event.self_cpu_time_total
        # Annotations span kernels that are counted already.
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent[event.key] += event.self_device_time_total  # kernels, not what launched them
    total = sum(spent.values())
    rows = [
        [key, f"{us / 1e3 / PROFILED:.1f}", f"{100 * us / total:.1f} %"]
        for key, us in spent.most_common(SHOWN)
    ]
    caption = f"{'GPU' if device == 'cuda' else 'CPU'} time of a step, by operation"
    return Table(["operation", "ms a step", "share"], rows, caption)
