"""The selective scan and the Mamba block: against the paper, other implementations and limits.

Gradients of the float32 kernel are compared with those of the float64 reference, which gradcheck
proves. gradcheck itself is of no use in float32: a difference quotient over eps has an error of
1e-7 / eps from rounding and eps^2 from curvature, at best 1e-5 of the largest output, and small
gradients drown in it.
"""

import copy
import importlib.util
import subprocess
import sys
import weakref
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambaflow.kernels import scan_cpu
from mambaflow.kernels.build import library
from mambaflow.models import selective_scan as scan_module
from mambaflow.models.mamba import Mamba, causal_conv
from mambaflow.models.selective_scan import fastest_backend, selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "z")
needs_native = pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")
FAST = ["chunked", pytest.param("native", marks=needs_native)]


def inputs(b: int, n: int, d: int, s: int, *, gate: bool = True, seed: int = 0) -> list[Tensor]:
    """Float64 tensors of a scan in the range of a network's."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, n, d), (b, n, d), (d, s), (b, n, s), (b, n, s), (d,), (b, n, d)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[1] -= 1
    tensors[2] = -tensors[2].exp()
    return tensors[: 7 if gate else 6]


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype, copy=True).requires_grad_() for x in tensors]


def with_gradients(work, tensors: list[Tensor], turn=lambda x: x) -> list[Tensor]:
    """The output and the gradient of every input, along a seeded direction."""
    y = work(*tensors)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, tensors, turn(dy).to(y.dtype))]


def scan_results(tensors: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    work = lambda *x: selective_scan(*x, backend=backend)  # noqa: E731
    return with_gradients(work, leaves(tensors, dtype))


def assert_near(found, right, most: float, names=NAMES, scales=None) -> None:
    """Every tensor within `most` of the largest number of its counterpart, or of `scales`."""
    for name, x, y, scale in zip(("y", *names), found, right, scales or right, strict=False):
        assert x.shape == y.shape, name
        error = (x.double() - y.double()).abs().max()
        assert error <= most * scale.abs().max().clamp(min=1e-30), f"{name}: off by {error}"


def without_cancellation(tensors: list[Tensor]) -> list[Tensor]:
    """How large results are if no terms cancel: what rounding errors are a fraction of."""
    loud = [x if i in (1, 2) else x.abs() for i, x in enumerate(tensors)]
    work = lambda *x: selective_scan(*x, backend="reference")  # noqa: E731
    return with_gradients(work, leaves(loud, torch.float64), torch.abs)


def from_the_paper(u, dt, A, B, C, D, z):
    """Gu & Dao 2023, equation 2 and Algorithm 2, number by number."""
    (b, n, d), s = u.shape, A.shape[1]
    y = np.zeros((b, n, d))
    for image in range(b):
        for channel in range(d):
            h = np.zeros(s)
            for i in range(n):
                delta = np.log(1 + np.exp(dt[image, i, channel]))
                for j in range(s):
                    a = np.exp(delta * A[channel, j])
                    h[j] = a * h[j] + delta * B[image, i, j] * u[image, i, channel]
                found = np.dot(C[image, i], h) + D[channel] * u[image, i, channel]
                gate = z[image, i, channel]
                y[image, i, channel] = found * gate / (1 + np.exp(-gate))
    return y


def test_the_reference_is_the_recurrence_of_the_paper():
    tensors = inputs(2, 7, 3, 5)
    right = from_the_paper(*(x.numpy() for x in tensors))
    np.testing.assert_allclose(selective_scan(*tensors, backend="reference"), right, rtol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_the_fast_scans_are_the_recurrence_of_the_paper(backend):
    tensors = inputs(2, 7, 3, 5)
    right = from_the_paper(*(x.numpy() for x in tensors))
    found = selective_scan(*(x.float() for x in tensors), backend=backend)
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("gate", [True, False])
def test_gradients_are_the_slopes_of_the_function(backend, gate, monkeypatch):
    monkeypatch.setattr(scan_module, "CHUNK", 4)  # 9 tokens cross two borders
    tensors = leaves(inputs(2, 9, 3, 2, gate=gate), torch.float64)
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, backend=backend), tensors)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_chunks_change_nothing(n):
    tensors = inputs(2, n, 5, 3)
    chunked = scan_results(tensors, "chunked", torch.float64)
    assert_near(chunked, scan_results(tensors, "reference", torch.float64), 1e-12)


@needs_native
@pytest.mark.parametrize("s", [1, 3, 4, 8, 12, 16, 17, 32, 64])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 408])
def test_the_kernel_is_within_a_hundred_thousandth_of_float64(n, s):
    tensors = inputs(2, n, 40, s)
    native = scan_results(tensors, "native", torch.float32)
    assert_near(native, scan_results(tensors, "reference", torch.float64), 1e-5)


def strided(x: Tensor, how: int) -> Tensor:
    """The same numbers laid out otherwise: dense, within wider rows, turned, or every other."""
    if how == 1:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    if how == 2:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else x
    return torch.repeat_interleave(x, 2, -1)[..., ::2] if how == 3 else x


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    b=st.integers(1, 5),
    n=st.integers(1, 70) | st.sampled_from([16, 32, 48, 64]),
    d=st.integers(1, 70),
    s=st.integers(1, 64),
    gate=st.booleans(),
    layout=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    seed=st.integers(0, 99),
)
def test_any_shape_and_layout(b, n, d, s, gate, layout, seed):
    tensors = inputs(b, n, d, s, gate=gate, seed=seed)
    views = lambda *x: selective_scan(*map(strided, x, layout[: len(x)]), backend="native")  # noqa: E731
    native = with_gradients(views, leaves(tensors, torch.float32))
    right, scales = scan_results(tensors, "reference", torch.float64), without_cancellation(tensors)
    assert_near(native, right, 1e-5, scales=scales)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("step", [-1e30, -100.0, -30.0, 0.0, 30.0, 1e4, 1e18])
@pytest.mark.parametrize("rate", [-1e-30, -1e-6, -1.0, -1e4, -1e30])
def test_extreme_steps_and_rates_stay_numbers(backend, step, rate):
    tensors = inputs(1, 40, 18, 4)
    tensors[1] = torch.full_like(tensors[1], step)
    tensors[2] = torch.full_like(tensors[2], rate)
    found = scan_results(tensors, backend, torch.float32)
    right = scan_results(tensors, "reference", torch.float64)
    for name, x, y in zip(("y", *NAMES), found, right, strict=True):
        assert not x.isnan().any(), name
        if y.abs().max() < 1e30:  # where float32 has room for it
            assert_near([x], [y], 1e-4)


def conv_by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, weight, bias, groups=x.shape[-1])).transpose(1, 2)


@needs_native
@pytest.mark.parametrize("taps", range(1, 9))
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 19), (7, 16), (40, 35)])
@pytest.mark.parametrize("layout", [0, 1, 2])
def test_the_convolution_is_torchs(taps, n, d, layout):
    torch.manual_seed(taps)
    shapes = [(3, n, d), (d, 1, taps), (d,)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    right = with_gradients(conv_by_torch, leaves(tensors, torch.float64))
    work = lambda x, w, b: scan_cpu.conv(strided(x, layout), w, b)  # noqa: E731
    found = with_gradients(work, leaves(tensors, torch.float32))
    assert_near(found, right, 1e-5, ("x", "weight", "bias"))


@needs_native
@pytest.mark.parametrize("shape", [(1, 70, 40, 16), (3, 33, 70, 5), (20, 17, 16, 8)])
def test_bits_do_not_depend_on_threads_nor_on_the_run(shape):
    tensors, weight = inputs(*shape), torch.randn(shape[2], 1, 4)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            scanned = scan_results(tensors, "native", torch.float32)
            work = lambda x: scan_cpu.conv(x, weight, weight[:, 0, 0])  # noqa: E731
            convolved = with_gradients(work, leaves(tensors[:1], torch.float32))
            results.append([*scanned, *convolved])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_float32_inside(dtype):
    half = [x.to(dtype) for x in inputs(2, 20, 18, 4)]
    found = scan_results(half, "native", dtype)
    inside = scan_results([x.float() for x in half], "native", torch.float32)
    assert all(x.dtype == dtype for x in found)
    assert torch.equal(found[0], inside[0].to(dtype))
    assert_near(found[1:], inside[1:], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", FAST)
def test_mixed_precisions_as_under_autocast(backend):
    tensors = [x.to(torch.float32 if x.dim() < 3 else torch.bfloat16) for x in inputs(2, 9, 8, 4)]
    y = selective_scan(*tensors, backend=backend)
    right = selective_scan(*(x.float() for x in tensors), backend=backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, right.bfloat16())


@pytest.mark.parametrize("native", [True, False])
def test_a_block_trains_under_autocast_with_and_without_the_kernels(native, monkeypatch):
    if not native:
        monkeypatch.setattr(scan_cpu, "is_supported", lambda *_, **__: False)
    torch.manual_seed(0)
    block, tokens = Mamba(16), torch.randn(2, 70, 16)
    plain = block(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half = block(tokens)
    half.float().square().sum().backward()
    assert half.dtype == torch.bfloat16 and block.A_log.grad.abs().sum() > 0
    assert (half - plain).abs().max() < 0.02 * plain.abs().max()


@needs_native
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_block_between_its_projections_takes_any_layout_and_half_precision(kind):
    torch.manual_seed(0)
    block = Mamba(20).to(kind)
    block.conv1d.bias = nn.Parameter(torch.randn(40, 2, dtype=kind)[:, 0])
    block.dt_proj.bias = nn.Parameter(torch.randn(40, 2, dtype=kind)[:, 1])
    assert not block.conv1d.bias.is_contiguous()
    xz = torch.randn(2, 80, 33).to(kind).mT
    layers = block.conv1d, block.x_proj, block.dt_proj
    y = scan_cpu.mamba_inner(xz, *layers, -block.A_log.exp(), block.D)
    assert y.dtype == kind
    whole, rates = copy.deepcopy(block).double(), -block.A_log.exp().double()
    x, z = xz.double().chunk(2, -1)
    x = causal_conv(x, whole.conv1d.weight, whole.conv1d.bias)
    dt, B, C = whole.x_proj(x).split([block.dt_rank, block.d_state, block.d_state], -1)
    right = selective_scan(x, whole.dt_proj(dt), rates, B, C, whole.D, z)
    assert (y - right).abs().max() < (1e-5 if kind == torch.float32 else 1e-2) * right.abs().max()


@needs_native
@pytest.mark.parametrize("n", [1, 16, 70])
def test_a_block_that_keeps_nothing_answers_the_same_bits_and_leaves_its_input(n):
    torch.manual_seed(0)
    block, tokens = Mamba(40), torch.randn(2, n, 40)
    kept, before = block(tokens), tokens.clone()
    with torch.no_grad():  # the scan writes over its own input
        assert torch.equal(block(tokens), kept)
    assert torch.equal(tokens, before)


class Peak(TorchDispatchMode):
    """The most bytes that live at once of what was made since, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.note(x)
        return out

    def note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = size
            weakref.finalize(storage, self.live.pop, key, None)
        self.largest = max(self.largest, size)
        self.most = max(self.most, sum(self.live.values()))


def peak(backend: str, n: int, d: int = 32, s: int = 64) -> Peak:
    tensors = leaves(inputs(1, n, d, s), torch.float32)
    with Peak() as found:
        selective_scan(*tensors, backend=backend).sum().backward()
    return found


@pytest.mark.parametrize("backend", FAST)
def test_memory_grows_with_the_tokens_and_never_holds_all_states(backend):
    short, long = peak(backend, 256), peak(backend, 1024)
    everything = 1024 * 32 * 64 * 4
    assert long.largest <= everything / 8
    assert long.most <= 4.1 * short.most
    assert long.most - short.most <= everything / 4  # what a token adds, besides one chunk


def test_the_meter_of_memory_sees_the_reference_keep_everything():
    assert peak("reference", 512).most >= 512 * 32 * 64 * 4


@pytest.mark.parametrize("backend", FAST)
def test_nothing_saved_has_all_states(backend):
    sizes = []
    tensors = leaves(inputs(2, 256, 16, 64), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        selective_scan(*tensors, backend=backend)
    assert max(sizes) <= 2 * 256 * 16 * 64 / 8


@needs_native
def test_without_a_backward_pass_no_states_are_kept():
    tensors = leaves(inputs(2, 256, 16, 64), torch.float32)
    with torch.no_grad(), Peak() as found:
        selective_scan(*tensors, backend="native")
    assert found.most == 2 * 256 * 16 * 4  # the output


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2)])
def test_nothing_in_nothing_out(backend, shape):
    results = scan_results(inputs(*shape), backend, torch.float32)
    assert results[0].shape == shape[:3]
    for x, like in zip(results[1:], inputs(*shape), strict=True):
        assert x.shape == like.shape and not x.any()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_nothing_convolves_to_nothing(shape):
    tensors = [torch.randn(size) for size in (shape, (3, 1, 4), (3,))]
    results = with_gradients(causal_conv, leaves(tensors, torch.float32))
    assert results[0].shape == shape and not any(x.any() for x in results)


@needs_native
def test_a_second_derivative_is_refused():
    tensors = leaves(inputs(1, 4, 3, 2), torch.float32)
    y = selective_scan(*tensors, backend="native").square().sum()
    (slope,) = torch.autograd.grad(y, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()


def unchecked(work, *args, **kwargs):
    """Call without the tests' check of shapes, as users do."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        return work(*args, **kwargs)
    finally:
        config.update("jaxtyping_disable", False)


@needs_native
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("u", lambda x: x.double(), r"u \(=torch.float64 on cpu\) must be float32"),
        ("A", lambda x: x.double(), r"A \(=torch.float64 on cpu\) must be"),
        ("z", lambda x: x.to("meta"), r"z \(=torch.float32 on meta\) must be .* use backend="),
        ("dt", lambda x: x[:, :3], r"dt \(of shape \(2, 3, 3\)\) must have shape \(2, 4, 3\)"),
        ("B", lambda x: x[:1], r"B \(of shape \(1, 4, 5\)\) must have shape \(2, 4, 5\)"),
        ("C", lambda x: x[..., :2], r"C \(of shape .* must have shape"),
        ("D", lambda x: x[:2], r"D \(of shape .* must have shape"),
    ],
)
def test_the_kernel_refuses_what_it_would_misread(name, change, message):
    tensors = dict(zip(NAMES, (x.float() for x in inputs(2, 4, 3, 5)), strict=True))
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=message):
        unchecked(selective_scan, **tensors, backend="native")


@needs_native
def test_the_kernel_refuses_more_states_than_it_has_registers_for():
    with pytest.raises(ValueError, match=r"states of A \(=65\) must be 1 to 64 here; use backend"):
        selective_scan(*(x.float() for x in inputs(1, 2, 3, 65)), backend="native")


@needs_native
@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 4, 3), (3, 1, 9), (3,), r"taps of weight \(=9\) must be 1 to 8"),
        ((2, 4, 3), (2, 1, 4), (3,), r"weight \(of shape"),
        ((2, 4, 3), (3, 1, 4), (2,), r"bias \(of shape"),
    ],
)
def test_the_convolution_refuses_what_it_would_misread(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        unchecked(
            scan_cpu.conv if weight[2] > 8 else causal_conv, *map(torch.zeros, (x, weight, bias))
        )


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown backend 'cuda13'; valid: auto, reference, chu"):
        selective_scan(*inputs(1, 2, 3, 4), backend="cuda13")


@needs_native
@pytest.mark.parametrize(("n", "d_state", "d_conv"), [(1, 1, 1), (3, 7, 4), (37, 16, 8)])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_fused_block_is_the_block_of_its_parts(n, d_state, d_conv, frozen, monkeypatch):
    torch.manual_seed(0)
    block = Mamba(24, d_state=d_state, d_conv=d_conv)
    block.in_proj.weight.requires_grad_(not frozen)
    tokens, wanted = torch.randn(3, n, 24), [p for p in block.parameters() if p.requires_grad]
    calls, results, inner = [], [], scan_cpu.mamba_inner
    monkeypatch.setattr(scan_cpu, "mamba_inner", lambda *x: calls.append(x) or inner(*x))
    for fuses in (True, False):
        monkeypatch.setattr(Mamba, "_fuses", lambda self, xz, fuses=fuses: fuses)
        y = block(tokens)
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert len(calls) == 1
    assert_near(*results, 1e-5, [name for name, p in block.named_parameters() if p.requires_grad])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_is_fused(dtype):
    block = Mamba(8)
    assert block._fuses(torch.zeros(1, 1, 32)) == (library() is not None)
    assert not block._fuses(torch.zeros(1, 1, 32, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):  # the projections are in half precision
        assert block(torch.randn(2, 5, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(("d_state", "d_conv"), [(65, 4), (16, 9), (80, 12)])
def test_a_block_too_large_for_the_kernel_runs_in_torch(d_state, d_conv):
    block = Mamba(8, d_state=d_state, d_conv=d_conv)
    tokens = torch.randn(2, 9, 8)
    y = block(tokens)
    torch.testing.assert_close(y.double(), block.double()(tokens.double()), rtol=1e-4, atol=1e-6)


def test_auto_takes_what_serves():
    cpu = "native" if library() else "chunked"
    assert fastest_backend(torch.zeros(1), 16) == cpu
    assert fastest_backend(torch.zeros(1), 65) == "chunked"
    assert fastest_backend(torch.zeros(1).double(), 16) == "chunked"


@pytest.mark.parametrize(
    ("installed", "backend"),
    [({"mamba_ssm", "triton"}, "cuda"), ({"triton"}, "triton"), (set(), "chunked")],
)
def test_auto_on_a_gpu_takes_mamba_ssm_or_says_how_to_have_it(
    installed, backend, monkeypatch, caplog
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    scan_module._has_mamba_ssm.cache_clear()
    scan_module._without_mamba_ssm.cache_clear()
    with FakeTensorMode():
        u = torch.empty(1, device="cuda")
    assert [fastest_backend(u, 16), fastest_backend(u, 16)] == [backend, backend]
    said = [r.message for r in caplog.records if "mamba_ssm is not installed" in r.message]
    assert len(said) == (backend != "cuda")
    assert all(f"slower backend {backend!r}" in m and "pip install --no-bu" in m for m in said)
    assert fastest_backend(u.double(), 16) == "chunked"
    scan_module._has_mamba_ssm.cache_clear()
    scan_module._without_mamba_ssm.cache_clear()


# The public mamba_ssm.Mamba(32) of version 2: what is in its state_dict.
PUBLIC = {
    "A_log": (64, 16),
    "D": (64,),
    "in_proj.weight": (128, 32),
    "conv1d.weight": (64, 1, 4),
    "conv1d.bias": (64,),
    "x_proj.weight": (34, 64),
    "dt_proj.weight": (64, 2),
    "dt_proj.bias": (64,),
    "out_proj.weight": (32, 64),
}


def test_weights_have_the_names_and_shapes_of_mamba_ssm():
    assert {k: tuple(v.shape) for k, v in Mamba(32).state_dict().items()} == PUBLIC
    assert Mamba(20).dt_rank == 2  # rounded up


def test_first_values_are_those_of_mamba_ssm():
    torch.manual_seed(0)
    block = Mamba(256)
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 17.0).expand(512, 16))
    assert (block.D == 1).all()
    step = F.softplus(block.dt_proj.bias)
    assert step.min() >= 0.99e-3 and step.max() <= 0.101
    spread = step.log().sort().values  # log-uniform between 1e-3 and 0.1
    even = torch.linspace(np.log(1e-3), np.log(0.1), 512)
    assert (spread - even).abs().max() < 0.5
    assert block.dt_proj.weight.abs().max() <= 0.25  # dt_rank^-1/2


def mixer(width: int = 32):
    """transformers' block of the same sizes."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=width, state_size=16, conv_kernel=4, expand=2,
                         num_hidden_layers=1, use_bias=False, use_conv_bias=True)  # fmt: skip
    return MambaMixer(config, layer_idx=0).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_block_is_transformers_forward_and_backward(dtype):
    torch.manual_seed(0)
    theirs, ours = mixer().to(dtype), Mamba(32).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.load_state_dict(ours.state_dict(), strict=True)  # and back
    tokens, dy = torch.randn(2, 75, 32, dtype=dtype), torch.randn(2, 75, 32, dtype=dtype)
    results = []
    for block in (ours, theirs):
        x = tokens.clone().requires_grad_()
        y = block(x)
        slopes = torch.autograd.grad(y, [x, *(p for _, p in sorted(block.named_parameters()))], dy)
        results.append([y.detach(), *slopes])
    assert_near(*results, 1e-5, ("tokens", *sorted(PUBLIC)))


def fake_mamba_ssm(calls: list[dict]) -> dict[str, ModuleType]:
    """mamba_ssm's public function (b, d, n), by its documentation, with the kernel's demands."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False,
    ):  # fmt: skip
        (b, d, n), s = u.shape, A.shape[1]
        assert delta.shape == (b, d, n) and A.shape == (d, s) and D.shape == (d,)
        assert B.shape == C.shape == (b, s, n) and (z is None or z.shape == (b, d, n))
        assert A.dtype == D.dtype == torch.float32, "the kernel's weights are float32"
        assert {x.dtype for x in (delta, B, C)} | ({z.dtype} if z is not None else set()) == {
            u.dtype
        }
        assert u.dtype in (torch.float32, torch.bfloat16, torch.float16)
        calls.append({"dtype": u.dtype, "softplus": delta_softplus})
        step = F.softplus(delta.float()) if delta_softplus else delta.float()
        h, ys = torch.zeros(b, d, s), []
        for i in range(n):
            decay = torch.exp(torch.einsum("bd,ds->bds", step[..., i], A))
            h = decay * h + torch.einsum("bd,bs,bd->bds", step[..., i], B[..., i].float(),
                                         u[..., i].float())  # fmt: skip
            ys.append(torch.einsum("bds,bs->bd", h, C[..., i].float()))
        y = torch.stack(ys, -1) + u.float() * D[:, None]
        return (y if z is None else y * F.silu(z.float())).to(u.dtype)

    names = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"]
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].selective_scan_fn = selective_scan_fn
    return modules


@pytest.fixture
def mamba_ssm(monkeypatch):
    calls: list[dict] = []
    for name, module in fake_mamba_ssm(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("gate", [True, False])
def test_mamba_ssms_kernel_is_called_as_its_documentation_says(mamba_ssm, gate):
    tensors = inputs(2, 9, 5, 3, gate=gate)
    found = scan_results(tensors, "cuda", torch.float32)
    assert_near(found, scan_results(tensors, "reference", torch.float64), 1e-5)
    assert mamba_ssm == [{"dtype": torch.float32, "softplus": True}]


def test_mamba_ssms_kernel_gets_one_precision_and_float32_weights(mamba_ssm):
    tensors = inputs(2, 9, 5, 3)
    kinds = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32,
             torch.bfloat16, torch.float32]  # fmt: skip
    y = selective_scan(*(x.to(k) for x, k in zip(tensors, kinds, strict=True)), backend="cuda")
    assert y.dtype == torch.bfloat16
    assert mamba_ssm == [{"dtype": torch.bfloat16, "softplus": True}]


@needs_native
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_the_native_operators_are_what_they_tell_torch(gated, keep):
    """Shapes without data, gradients, aliases: torch's own checks of an operator."""
    tensors = leaves(inputs(2, 33, 20, 3), torch.float32)
    gate = tensors[-1] if gated else None
    torch.library.opcheck(scan_cpu._scan, (*tensors[:6], gate, keep), test_utils=CHECKS[keep])
    d = 20
    weights = [torch.randn(size) for size in ((4, d), (d,), (8, d), (d, 2), (d,))]
    rates, skip = -torch.rand(d, 3), torch.randn(d)
    inner = [x.requires_grad_() for x in (torch.randn(2, 33, 2 * d), *weights, rates, skip)]
    torch.library.opcheck(scan_cpu._inner, (*inner, keep), test_utils=CHECKS[keep])
    torch.library.opcheck(scan_cpu._conv, (torch.randn(2, 33, d), *weights[:2]))


LIGHT = ("test_schema", "test_autograd_registration", "test_faketensor")
# Gradients need the states that only `keep` keeps.
CHECKS = {True: (*LIGHT, "test_aot_dispatch_static"), False: LIGHT}


CHOICE = """
import torch
from mambaflow.models import selective_scan
whole = torch.compile(lambda x: x + len(selective_scan._on_gpu()), backend="eager", fullgraph=True)
print(int(whole(torch.zeros(()))), int(whole(torch.zeros(2))[0]), len(selective_scan._on_gpu()))
"""


def test_the_choice_of_a_gpus_backend_is_a_constant_to_torch_compile():
    done = subprocess.run([sys.executable, "-c", CHOICE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(done.stdout.split())) == 1 and done.stderr.count("mamba_ssm is not") <= 1
