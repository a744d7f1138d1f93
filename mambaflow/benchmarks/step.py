"""Where the time of a training step goes, and the floor under it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

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
from mambaflow.data.batches import PixelBatch
from mambaflow.kernels.linear import large, linear_forward
from mambaflow.models.velocity_field import parameters
from mambaflow.report.tables import Table
from mambaflow.training.loop import StepResult, TrainState, compiled, fit
from mambaflow.training.objective import Objective

Size = Sequence[int]
PROFILED, SHOWN = 3, 14  # steps, and operations of them


def _between(xz: Size, conv: Size, bias: Size, to_ranks: Size, to_dt: Size, *_: object) -> int:
    """FLOPs of the products inside `scan_cpu.mamba_inner`: to the ranks, from them to dt."""
    # For torch these are operators of ours, whose products it does not see. xz is (b, n, 2 d): two
    # FLOPs a multiplication, for every token.
    return 2 * xz[0] * xz[1] * (math.prod(to_ranks) + math.prod(to_dt))


def _attention(query: Size, key: Size, value: Size, *_: object) -> int:
    """FLOPs of the products of `attention_cpu`, forward."""
    # Scores, of the query's width, and their sum over values, of the value's.
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


# Inputs of the backward operators: the slope and what was kept, then those of the forward one. What
# is computed again on the way is not counted.
INSIDE: dict[object, Callable[..., int]] = {
    torch.ops.mambaflow.mamba_inner: lambda *shapes, **_: _between(*shapes),
    torch.ops.mambaflow.mamba_inner_backward: lambda *shapes, **_: 2 * _between(*shapes[5:]),
    torch.ops.mambaflow.attend: lambda *shapes, **_: _attention(*shapes),
    torch.ops.mambaflow.attend_backward: lambda *given, **_: (
        # Twice with gradients of key and value (the operator's last input), once without.
        _attention(*given[3:]) * (2 if given[-1] else 1)
    ),
    torch.ops.mambaflow.linear: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    torch.ops.mambaflow.weight_grad: lambda dy, x, **_: 2 * math.prod(x) * dy[1],
}


def counted_flops(state: TrainState, batch: PixelBatch, config: BenchmarkConfig) -> int:
    """FLOPs of the matrix products and attentions of a step, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    # The network as it is, not compiled: an operator is counted as it is called.
    with FlopCounterMode(display=False, custom_mapping=INSIDE) as counter:
        next(iter(fit(state, Fixed(batch), step_config(config), state.step + 1)))
    return counter.get_total_flops()


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
    state = TrainState(ARCHITECTURES[config.arch], step_config(config), torch.device(config.device))
    flops = counted_flops(state, batch, config)
    forward = compiled(Objective(state.model, step_config(config)), config.compile)
    # Goes on after the counted step. The race's first round warms up: compiling is in it.
    steps = fit(state, Fixed(batch), step_config(config), 10**9, forward)
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
