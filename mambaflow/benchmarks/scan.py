"""The scan against its rivals and the matrix products of its block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambaflow.benchmarks.bench import BenchmarkConfig, Work, against, device_name, race
from mambaflow.config import ARCHITECTURES
from mambaflow.kernels.linear import linear
from mambaflow.models.mamba import Mamba
from mambaflow.models.selective_scan import fastest_backend, selective_scan
from mambaflow.report.tables import Table


def scan_inputs(config: BenchmarkConfig, n: int, d: int, s: int) -> list[Tensor]:
    """Tensors of the scan at the block's shape, requiring gradients."""
    torch.manual_seed(0)
    b = config.batch_size
    # u, dt, A, B, C, D and z.
    shapes = [(b, n, d), (b, n, d), (d, s), (b, n, s), (b, n, s), (d,), (b, n, d)]
    tensors = [torch.randn(shape, device=config.device) for shape in shapes]
    # dt goes through softplus: steps of about 0.05, where a block begins with 0.001 to 0.1. A is
    # below 0, so that states decay.
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
    # Gradients from above, made beforehand. The graph of a forward pass serves one backward pass,
    # so that a turn has both.
    slopes = [torch.randn_like(y) for y in work()]
    return lambda: torch.autograd.grad(work(), inputs, slopes)


def pscan(inputs: list[Tensor]) -> Tensor:
    """mambapy's parallel scan of the same recurrence."""
    from mambapy.pscan import pscan as parallel

    u, dt, A, B, C, D, z = inputs
    dt = nn.functional.softplus(dt)
    # It holds all states of all tokens, b n d s numbers.
    h = parallel(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None])
    return ((h @ C[..., None])[..., 0] + D * u) * nn.functional.silu(z)


def measure(config: BenchmarkConfig) -> list[Table]:
    """The scan at the V2 block's shape, forward and with backward."""
    model = ARCHITECTURES[config.arch]
    # Known pixels and queries together, where they are equally many.
    width, b, n = model.d_model, config.batch_size, 2 * config.queries
    block = Mamba(width, model.d_state, model.d_conv, model.expand).to(config.device)
    tokens = torch.randn(b, n, width, device=config.device, requires_grad=True)
    inputs = scan_inputs(config, n, width * model.expand, model.d_state)
    gemms = block_gemms(block, b, n)
    # What gradients of the products are of: inputs and weights, no biases.
    factors = [x for x, _ in gemms] + [layer.weight for _, layer in gemms]
    best = fastest_backend(inputs[0], model.d_state)
    works: dict[str, tuple[Callable[[], list[Tensor]], list[Tensor]]] = {
        "block's matrix products": (lambda: [linear(x, m.weight) for x, m in gemms], factors),
        "the same by torch alone": (lambda: [x @ m.weight.t() for x, m in gemms], factors),
        "whole block": (lambda: [block(tokens)], [tokens, *block.parameters()]),
    }
    others = ["triton"] if best == "cuda" else []  # what serves where mamba-ssm is not installed
    for name in dict.fromkeys([best, *others, "chunked", "reference"]):
        # name=name: a lambda looks a loop's variable up when it is called, at its last value.
        scan = lambda name=name: [selective_scan(*inputs, backend=name)]  # noqa: E731
        works[f"scan: {name}"] = (scan, inputs)
    forward: dict[str, Work] = {name: work for name, (work, _) in works.items()}
    forward["scan: mambapy pscan"] = lambda: pscan(inputs)
    both = {name: backward(work, given) for name, (work, given) in works.items()}
    with torch.no_grad():
        first = race(forward, config.repeats, config.device)
    second = race(both, config.repeats, config.device)
    shape = f"b {b}, n {n}, {width * model.expand} channels, {model.d_state} states"
    shape += f"; {device_name(config.device)}"
    heading = ["work", "ms", "/ block's matrix products"]
    return [
        Table(heading, against(times, "block's matrix products"), f"{name}; {shape}")
        for name, times in (("forward", first), ("forward and backward", second))
    ]
