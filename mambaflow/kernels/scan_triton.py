"""The selective scan as a Triton kernel, for GPUs without mamba_ssm.

A program takes one image and a block of channels, with their states in registers, and walks along
the tokens. Forward saves the states at the start of every chunk. Backward computes a chunk's
states again from there into a scratch of one chunk, and walks back over it: memory is O(n). Sums
over images and blocks are left to torch, in a fixed order: the same bits at every run.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mambaflow.kernels.build import needs_grad
from mambaflow.kernels.checks import refuse_kinds, refuse_scan_shapes
from mambaflow.kernels.scan_op import CURE, scan_operator
from mambaflow.kernels.transforms import refuse_transformed

CHUNK = 32
NUMBERS = 512  # of state in a program, 16 a thread: twice as many would not stay in registers


@triton.jit
def _softplus(x):
    """log(1 + e^x); log(w) e / (w - 1) with w = 1 + e as rounded loses no digit (Kahan)."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    return tl.maximum(x, 0.0) + tl.where(w == 1.0, e, tl.log(w) * (e / (w - 1.0)))


@triton.jit
def _row(rows, at, column, inside):
    """One token's numbers, in float32; zero beyond the edge."""
    return tl.load(rows + at + column, inside, 0.0).to(tl.float32)


@triton.jit
def _step(u, dt, B, rates, h):
    """The states after one token: decayed, and driven by dt u B."""
    return tl.exp(dt[:, None] * rates) * h + (dt * u)[:, None] * B[None]


# In both kernels c are the channels of the block, j the states, and tiles of (c, j) lie as A does,
# (d, s), at `place`; what is beyond d or s is masked. x_b and x_n are the strides of x between
# images and tokens; its last one is 1.
@triton.jit
def _forward(
    u, dt, A, B, C, D, z, y, saved, n, d, s,
    u_b, u_n, dt_b, dt_n, B_b, B_n, C_b, C_n, z_b, z_n,
    GATED: tl.constexpr, SAVE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STATES: tl.constexpr,
):  # fmt: skip
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)  # offsets of images need 64 bits
    c, j = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    has_c, has_j = c < d, j < s
    place = (c * s)[:, None] + j[None]
    has = has_c[:, None] & has_j[None]
    rates, skip = tl.load(A + place, has, 0.0), tl.load(D + c, has_c, 0.0)
    h = tl.zeros((BLOCK, STATES), tl.float32)
    for i in range(n):
        if SAVE:
            if i % CHUNK == 0:
                chunk = image * tl.cdiv(n, CHUNK) + i // CHUNK
                tl.store(saved + chunk * d * s + place, h, has)
        u_i = _row(u, image * u_b + i * u_n, c, has_c)
        dt_i = _softplus(_row(dt, image * dt_b + i * dt_n, c, has_c))
        h = _step(u_i, dt_i, _row(B, image * B_b + i * B_n, j, has_j), rates, h)
        out = tl.sum(h * _row(C, image * C_b + i * C_n, j, has_j)[None], 1) + skip * u_i
        if GATED:
            z_i = _row(z, image * z_b + i * z_n, c, has_c)
            out *= z_i * tl.sigmoid(z_i)
        tl.store(y + (image * n + i) * d + c, out, has_c)


@triton.jit
def _backward(
    u, dt, A, B, C, D, z, dy, saved, scratch, du, ddt, dA, dB, dC, dD, dz, n, d, s,
    u_b, u_n, dt_b, dt_n, B_b, B_n, C_b, C_n, z_b, z_n,
    GATED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, j = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    has_c, has_j = c < d, j < s
    place = (c * s)[:, None] + j[None]
    has = has_c[:, None] & has_j[None]
    rates, skip = tl.load(A + place, has, 0.0), tl.load(D + c, has_c, 0.0)
    # dnext: what comes back to a token's states from the token after; sums over tokens for A and D.
    dnext, sum_A = tl.zeros((BLOCK, STATES), tl.float32), tl.zeros((BLOCK, STATES), tl.float32)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    chunks = tl.cdiv(n, CHUNK)
    partial = (block * tl.num_programs(0) + image) * n * s  # in dB and dC: (blocks, b, n, s)
    for k in range(chunks):
        first = (chunks - 1 - k) * CHUNK
        steps = tl.minimum(CHUNK, n - first)
        h = tl.load(saved + (image * chunks + first // CHUNK) * d * s + place, has, 0.0)
        for i in range(steps):  # forward: the states before every token of the chunk
            tl.store(scratch + (image * CHUNK + i) * d * s + place, h, has)
            u_i = _row(u, image * u_b + (first + i) * u_n, c, has_c)
            dt_i = _softplus(_row(dt, image * dt_b + (first + i) * dt_n, c, has_c))
            h = _step(u_i, dt_i, _row(B, image * B_b + (first + i) * B_n, j, has_j), rates, h)
        tl.debug_barrier()  # other threads read what these stored
        for back in range(steps):
            i = steps - 1 - back
            at = first + i
            u_i = _row(u, image * u_b + at * u_n, c, has_c)
            raw = _row(dt, image * dt_b + at * dt_n, c, has_c)
            B_i = _row(B, image * B_b + at * B_n, j, has_j)
            C_i = _row(C, image * C_b + at * C_n, j, has_j)
            to = (image * n + at) * d + c
            dy_i = tl.load(dy + to, has_c, 0.0).to(tl.float32)
            dt_i = _softplus(raw)
            decay = tl.exp(dt_i[:, None] * rates)
            decayed = decay * tl.load(scratch + (image * CHUNK + i) * d * s + place, has, 0.0)
            h = decayed + (dt_i * u_i)[:, None] * B_i[None]
            if GATED:
                z_i = _row(z, image * z_b + at * z_n, c, has_c)
                sig = tl.sigmoid(z_i)
                plain = tl.sum(h * C_i[None], 1) + skip * u_i
                tl.store(dz + to, dy_i * plain * sig * (1.0 + z_i * (1.0 - sig)), has_c)
                dy_i *= z_i * sig
            dh = dnext + dy_i[:, None] * C_i[None]
            dexponent = dh * decayed  # of dt A, by the chain rule through exp(dt A) h
            ddrive = tl.sum(dh * B_i[None], 1)  # of dt u
            tl.store(du + to, ddrive * dt_i + dy_i * skip, has_c)
            ddt_i = tl.sum(dexponent * rates, 1) + ddrive * u_i
            tl.store(ddt + to, ddt_i * tl.sigmoid(raw), has_c)
            tl.store(dB + partial + at * s + j, tl.sum(dh * (dt_i * u_i)[:, None], 0), has_j)
            tl.store(dC + partial + at * s + j, tl.sum(h * dy_i[:, None], 0), has_j)
            sum_A += dexponent * dt_i[:, None]
            sum_D += dy_i * u_i
            dnext = dh * decay
        tl.debug_barrier()  # before the next chunk's states replace these
    tl.store(dA + image * d * s + place, sum_A, has)
    tl.store(dD + image * d + c, sum_D, has_c)


def scan(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b n d"] | None = None,
) -> Float[Tensor, "b n d"]:
    """The gated selective scan, float32 inside; see `models.selective_scan`.

    Raises:
        ValueError: no states, double precision, several devices, shapes that disagree, or an image
            whose tokens x channels the kernel cannot count in 32 bits.
        NotImplementedError: derivatives by forward_ad or torch.func.
    """
    refuse_scan_shapes(u, dt, A, B, C, D, z)
    refuse_kinds(u.device, "use backend='chunked'", u=u, dt=dt, A=A, B=B, C=C, D=D, z=z)
    if A.shape[1] == 0:
        raise ValueError("states of A (=0) must be at least 1 here; use backend='chunked'")
    refuse_transformed("the Triton scan", CURE, u, dt, A, B, C, D, z)
    gate = None if z is None else _dense(z)
    inputs = (_dense(u), _dense(dt), A.float(), _dense(B), _dense(C), D.float(), gate)
    widest = max(x.stride(1) for x in inputs if x is not None and x.dim() == 3)
    if u.shape[1] * widest >= 2**31:
        raise ValueError(
            f"{u.shape[1]} tokens in rows of {widest} numbers must stay below 2^31 numbers an "
            "image; use backend='chunked'"
        )
    return _scan(*inputs, needs_grad(*inputs))[0]


def _sizes(d: int, s: int) -> tuple[int, dict[str, int]]:
    """Blocks of channels, and how the kernels are to be made for them."""
    states = triton.next_power_of_2(s)  # tl.arange knows no other lengths
    block = max(1, min(32, NUMBERS // states))
    options = {"num_warps": 1, "enable_fp_fusion": True}
    return triton.cdiv(d, block), {"CHUNK": CHUNK, "BLOCK": block, "STATES": states, **options}


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*rows: Tensor | None) -> list[int]:
    return [s for x in rows for s in ((0, 0) if x is None else x.stride()[:2])]


def _allocate(u: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for the output and, where `save`, for the states at the start of every chunk,
    in float32, as A is."""
    (b, n, d), s = u.shape, A.shape[1]
    return u.new_empty(b, n, d), A.new_empty((b, -(-n // CHUNK), d, s) if save else (0,))


def _scan_forward(u, dt, A, B, C, D, z, save) -> tuple[Tensor, Tensor]:
    (b, n, d), s = u.shape, A.shape[1]
    y, saved = _allocate(u, A, save)
    blocks, sizes = _sizes(d, s)
    with torch.cuda.device_of(u):  # Triton launches on the current device
        _forward[b, blocks](
            u, dt, A.contiguous(), B, C, D.contiguous(), u if z is None else z, y, saved, n, d, s,
            *_strides(u, dt, B, C, z), GATED=z is not None, SAVE=save, **sizes,
        )  # fmt: skip
    return y, saved


def _scan_backward(dy, saved, u, dt, A, B, C, D, z) -> list[Tensor]:
    # A pointer must be given for z and dz even where there is no gate: any, since none is read.
    (b, n, d), s = u.shape, A.shape[1]
    blocks, sizes = _sizes(d, s)
    du, ddt = u.new_empty(b, n, d), dt.new_empty(b, n, d)
    dz = du if z is None else z.new_empty(b, n, d)
    dA, dD, scratch = A.new_empty(b, d, s), A.new_empty(b, d), A.new_empty(b, CHUNK, d, s)
    dB, dC = A.new_empty(blocks, b, n, s), A.new_empty(blocks, b, n, s)
    with torch.cuda.device_of(u):
        _backward[b, blocks](
            u, dt, A.contiguous(), B, C, D.contiguous(), u if z is None else z, dy.contiguous(),
            saved, scratch, du, ddt, dA, dB, dC, dD, dz, n, d, s, *_strides(u, dt, B, C, z),
            GATED=z is not None, **sizes,
        )  # fmt: skip
    grads = [du, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0)]
    return grads if z is None else [*grads, dz]


_scan = scan_operator("triton_scan", _scan_forward, _scan_backward, _allocate)
