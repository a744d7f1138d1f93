"""The scan of the selective state-space model of Gu & Dao 2023.

For each channel with s numbers of state (Algorithm 2; zero-order hold for A, Euler
for B, as in the authors' code), with dt = softplus(raw dt) and a gate z:

    h_i = exp(dt_i A) h_{i-1} + dt_i B_i u_i      y_i = (C_i . h_i + D u_i) silu(z_i)

One function, `selective_scan`, and several ways to compute it. Tokens come before channels,
(b, n, d): channels are contiguous, and no way but mamba-ssm's needs a transpose.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambaflow.kernels import scan_cpu
from mambaflow.kernels.checks import KINDS, refuse_kinds, refuse_scan_shapes
from mambaflow.kernels.compiler import constant, opaque
from mambaflow.kernels.transforms import is_transformed

CHUNK = 64  # tokens: what is computed again at once, (b, 64, d, s), against what is saved
CUDA_STATES = 256  # the most that mamba-ssm's kernel takes
FLOATS = (*KINDS, torch.float64)
log = logging.getLogger(__name__)

Scan = Callable[..., Tensor]


def scan_reference(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b n d"] | None = None,
) -> Float[Tensor, "b n d"]:
    """The recurrence as it is written, step by step, in the precision given, of several the widest;
    autograd saves it all."""
    kind, wide = u.dtype, _checked_dtype(u, dt, A, B, C, D, z)
    u, dt, A, B, C, D = (x.to(wide) for x in (u, dt, A, B, C, D))
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y, _ = _recur(h, u, F.softplus(dt), A, B, C)
    return _finish(y, u, D, None if z is None else z.to(wide)).to(kind)


def _recur(
    h: Float[Tensor, "b d s"], u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b d s"]]:
    """The outputs C h of some tokens, and the state after them; dt is past its softplus."""
    decay = torch.exp(dt[..., None] * A)
    drive = (dt * u)[..., None] * B[:, :, None]
    states = []
    # unbind, once: an index at every token would make a gradient as large as all tokens for each.
    for a, x in zip(decay.unbind(1), drive.unbind(1), strict=True):
        h = torch.addcmul(x, a, h)
        states.append(h)
    return torch.einsum("bnds,bns->bnd", torch.stack(states, 1), C), h


def _finish(y: Tensor, u: Tensor, D: Tensor, z: Tensor | None) -> Tensor:
    y = y + D * u
    return y if z is None else y * silu(z)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x); in a transform by operations whose gradients have tangents, as torch's silu's
    has none."""
    return x * torch.sigmoid(x) if is_transformed() else F.silu(x)


def scan_chunked(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b n d"] | None = None,
) -> Float[Tensor, "b n d"]:
    """The same in chunks, each computed again in the backward pass.

    What is saved is the state between chunks, n s / 64 numbers per channel: memory is O(n), and
    (b, n, d, s) never exists. Half precisions, as autocast gives them, are float32 inside, and all
    is float64 where one tensor is. In transforms of torch.func, which allow no checkpoints, and of
    forward_ad all states are saved.
    """
    kind = u.dtype
    wide = torch.promote_types(_checked_dtype(u, dt, A, B, C, D, z), torch.float32)
    u, dt, A, B, C, D = (x.to(wide) for x in (u, dt, A, B, C, D))
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    recompute = torch.is_grad_enabled() and not is_transformed()
    outputs = []
    for u_i, dt_i, B_i, C_i in zip(
        *(x.split(CHUNK, 1) for x in (u, F.softplus(dt), B, C)), strict=True
    ):
        if recompute:
            # Nothing in a chunk is random: no state of a generator needs to be stored.
            y, h = checkpoint(
                _recur, h, u_i, dt_i, A, B_i, C_i, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, h = _recur(h, u_i, dt_i, A, B_i, C_i)
        outputs.append(y)
    return _finish(torch.cat(outputs, 1), u, D, None if z is None else z.to(wide)).to(kind)


def scan_cuda(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b n d"] | None = None,
) -> Float[Tensor, "b n d"]:
    """mamba-ssm's kernel, which takes channels before tokens.

    Raises:
        ValueError: no states, or more than it has room for; double precision.
    """
    refuse_scan_shapes(u, dt, A, B, C, D, z)
    if not 1 <= A.shape[1] <= CUDA_STATES:
        raise ValueError(
            f"states of A (={A.shape[1]}) must be 1 to {CUDA_STATES} here; use backend='chunked'"
        )
    refuse_kinds(u.device, "use backend='chunked'", u=u, dt=dt, A=A, B=B, C=C, D=D, z=z)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def channels_first(x: Tensor) -> Tensor:
        return x.to(u.dtype).transpose(1, 2)

    gate = None if z is None else channels_first(z)
    # Its A and D are float32 always; what is of tokens shares one precision.
    y = selective_scan_fn(
        channels_first(u), channels_first(dt), A.float(), channels_first(B), channels_first(C),
        D.float(), z=gate, delta_softplus=True,
    )  # fmt: skip
    return y.transpose(1, 2)


def scan_triton(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b n d"] | None = None,
) -> Float[Tensor, "b n d"]:
    """Our kernel for GPUs without mamba-ssm."""
    # Not above: a torch for CPUs alone brings no Triton.
    from mambaflow.kernels import scan_triton

    return scan_triton.scan(u, dt, A, B, C, D, z)


BACKENDS: dict[str, Scan] = {
    "reference": scan_reference,
    "chunked": scan_chunked,
    "native": scan_cpu.scan,
    # What mamba-ssm compiled is nothing that torch.compile can look into.
    "cuda": opaque(scan_cuda, used=importlib.util.find_spec("mamba_ssm") is not None),
    "triton": scan_triton,
}


def selective_scan(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b n d"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "b n d"]:
    """The gated selective scan.

    Args:
        u: what drives the state.
        dt: raw step sizes; their softplus is taken here.
        A: decay rates, negative.
        z: gate, or none.
        backend: "auto" takes the fastest there is for these tensors.

    Raises:
        ValueError: an unknown backend; shapes that disagree; whole numbers; several devices; what
            the backend cannot take.
    """
    if backend == "auto":
        states = A.shape[1] if A.dim() == 2 else 0  # another shape is refused by what takes all
        backend = fastest_backend(u, states, dt, A, B, C, D, z)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: auto, {', '.join(BACKENDS)}")
    if not u.numel():
        return _scan_nothing(u, dt, A, B, C, D, z)
    return BACKENDS[backend](u, dt, A, B, C, D, z)


def _scan_nothing(u, dt, A, B, C, D, z) -> Tensor:
    """The scan of no tokens, images or channels. Every input is part of it, so that each has a
    gradient, of zeros, as after any other scan."""
    _checked_dtype(u, dt, A, B, C, D, z)
    return (_finish(u * dt, u, D, z) + 0 * (A.sum() + B.sum() + C.sum())).to(u.dtype)


def _checked_dtype(u, dt, A, B, C, D, z) -> torch.dtype:
    """The precision that holds all inputs of a scan, whose shapes and kinds fit."""
    refuse_scan_shapes(u, dt, A, B, C, D, z)
    return common_dtype(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z)


def common_dtype(**tensors: Tensor | None) -> torch.dtype:
    """The precision that holds all these tensors' numbers, of which there are some.

    Raises:
        ValueError: one of whole numbers, or on another device than the first.
    """
    present = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(present.values()))
    wide = first.dtype
    for name, x in present.items():
        if x.dtype not in FLOATS or x.device != first.device:
            raise ValueError(
                f"{name} (={x.dtype} on {x.device}) must be float64, float32, bfloat16 or float16 "
                f"on {first.device}; convert it"
            )
        wide = torch.promote_types(wide, x.dtype)
    return wide


def fastest_backend(u: Tensor, states: int, *others: Tensor | None) -> str:
    """The backend that "auto" takes for a tensor like this one, with this many states, and for the
    scan's other tensors."""
    if is_transformed():
        return "chunked"
    if not u.is_cuda:
        return "native" if scan_cpu.is_supported(u, *others, states=states) else "chunked"
    if states < 1 or not all(x is None or x.dtype in KINDS for x in (u, *others)):
        return "chunked"  # which takes double precision, and refuses whole numbers
    backend = _on_gpu()
    return _own_on_gpu() if backend == "cuda" and states > CUDA_STATES else backend


@constant  # which torch.compile reads of a plain function alone
def _on_gpu() -> str:
    return "cuda" if _has_mamba_ssm() else _without_mamba_ssm()


@constant
def _own_on_gpu() -> str:
    return "triton" if _has_triton() else "chunked"


@cache
def _has_mamba_ssm() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _without_mamba_ssm() -> str:
    """The backend on a GPU that lacks mamba_ssm, after one warning."""
    backend = _own_on_gpu()
    log.warning(
        "mamba_ssm is not installed: the scan on this GPU takes the slower backend %r; where nvcc "
        "is present, MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation 'mambaflow[cuda]'",
        backend,
    )
    return backend
