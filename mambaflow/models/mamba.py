"""The Mamba block around the selective scan (Gu & Dao 2023, figure 3)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.checks import require
from mambaflow.kernels import scan_cpu
from mambaflow.kernels.checks import refuse_conv_shapes
from mambaflow.kernels.linear import Linear
from mambaflow.models.selective_scan import common_dtype, selective_scan, silu


def causal_conv(
    x: Float[Tensor, "b n d"], weight: Float[Tensor, "d 1 w"], bias: Float[Tensor, " d"]
) -> Float[Tensor, "b n d"]:
    """silu of each channel's convolution with its own past; weight as nn.Conv1d has it.

    Raises:
        ValueError: shapes that disagree, no taps, whole numbers, or several devices.
    """
    taps = weight.shape[-1] if weight.dim() else 0
    if scan_cpu.is_supported(x, weight, bias, taps=taps):
        return scan_cpu.conv(x, weight, bias)
    refuse_conv_shapes(x, weight, bias)
    require(taps >= 1, "taps of weight (=0) must be at least 1; a sum of none is no convolution")
    wide = common_dtype(x=x, weight=weight, bias=bias)
    if not x.numel():  # conv1d refuses it; gradients of nothing are zero
        return (x * bias + 0 * weight.sum()).to(x.dtype)
    weight, bias = weight.to(wide), bias.to(wide)
    # Padded on both sides, as conv1d can only be; what looks beyond the last token is cut off.
    y = F.conv1d(x.to(wide).transpose(1, 2), weight, bias, padding=taps - 1, groups=len(bias))
    return silu(y[..., : x.shape[1]]).transpose(1, 2).to(x.dtype)


class Mamba(nn.Module):
    """The Mamba block, with the parameters of `mamba_ssm.Mamba`: names, shapes and first values.

    Weights move between the two unchanged. (Gu & Dao 2023, figure 3; S4D-real A.)

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        for name, size in sizes.items():
            require(size >= 1, f"{name} (={size}) must be at least 1")
        d_inner, self.d_state = expand * d_model, d_state
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, d_inner)
        # A = -exp(A_log) is negative whatever is learned: states decay. At first -1, -2, ... -s.
        rates = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = Linear(d_inner, d_model, bias=False)
        # The mark by which training.loop, as mamba_ssm's trainers, knows what not to decay.
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self._init_steps()

    def _init_steps(self, least: float = 1e-3, most: float = 0.1) -> None:
        """Step sizes log-uniform in [least, most] at the start, as mamba_ssm draws them."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_dt = torch.empty(self.D.shape).uniform_(math.log(least), math.log(most))
        dt = log_dt.exp().clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus's inverse

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Each token after those before it."""
        xz = self.in_proj(tokens)
        with torch.autocast(xz.device.type, enabled=False):  # states decay through fp32
            A = -torch.exp(self.A_log)
        if self._fuses(xz, A):
            inner = scan_cpu.mamba_inner(xz, self.conv1d, self.x_proj, self.dt_proj, A, self.D)
            return self.out_proj(inner)
        x, z = xz.chunk(2, -1)
        assert self.conv1d.bias is not None
        x = causal_conv(x, self.conv1d.weight, self.conv1d.bias)
        ranks = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = self.x_proj(x).split(ranks, -1)
        dt = self.dt_proj(dt)
        # Autocast would take in half precision what a scan of torch's operations multiplies.
        with torch.autocast(x.device.type, enabled=False):
            y = selective_scan(x, dt, A, B, C, self.D, z)
        return self.out_proj(y)

    def _fuses(self, xz: Tensor, A: Tensor) -> bool:
        """Whether the native kernels take the whole block, in float32."""
        conv, ranks = self.conv1d, self.x_proj
        # Half precisions take the path of their parts, where autocast sees each product.
        kinds = {xz.dtype, A.dtype, self.D.dtype, conv.weight.dtype, ranks.weight.dtype}
        sizes = {"states": self.d_state, "taps": conv.kernel_size[0]}
        return kinds == {torch.float32} and scan_cpu.is_supported(xz, **sizes)
