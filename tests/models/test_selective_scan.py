"""The selective scan: against the paper, other implementations and limits."""

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
from scans import (
    FAST,
    NAMES,
    assert_near,
    inputs,
    leaves,
    needs_native,
    scan_results,
    strided,
    unchecked,
    with_gradients,
    without_cancellation,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambaflow.kernels import scan_cpu
from mambaflow.kernels.build import library
from mambaflow.models import selective_scan as scan_module
from mambaflow.models.selective_scan import fastest_backend, selective_scan


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
    assert_near([found], [torch.from_numpy(right)], 1e-5, sizes=without_cancellation(tensors))


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
    right, sizes = scan_results(tensors, "reference", torch.float64), without_cancellation(tensors)
    assert_near(chunked, right, 1e-13, sizes=sizes)


@needs_native
@pytest.mark.parametrize("s", [1, 3, 4, 8, 12, 16, 17, 32, 64])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 408])
def test_the_kernel_is_within_a_hundred_thousandth_of_float64(n, s):
    tensors = inputs(2, n, 40, s)
    native = scan_results(tensors, "native", torch.float32)
    right, sizes = scan_results(tensors, "reference", torch.float64), without_cancellation(tensors)
    assert_near(native, right, 1e-5, sizes=sizes)


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
    right, sizes = scan_results(tensors, "reference", torch.float64), without_cancellation(tensors)
    assert_near(native, right, 1e-5, sizes=sizes)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("step", [-1e30, -100.0, -30.0, 0.0, 30.0, 1e4, 1e18])
@pytest.mark.parametrize("rate", [-1e-30, -1e-6, -1.0, -1e4, -1e30, -2.5e38, -3.4e38])
def test_extreme_steps_and_rates_stay_numbers(backend, step, rate):
    tensors = inputs(1, 40, 18, 4)
    tensors[1] = torch.full_like(tensors[1], step)
    tensors[2] = torch.full_like(tensors[2], rate)
    found = scan_results(tensors, backend, torch.float32)
    right, sizes = scan_results(tensors, "reference", torch.float64), without_cancellation(tensors)
    for name, x, y, size in zip(("y", *NAMES), found, right, sizes, strict=True):
        assert not x.isnan().any(), name
        if size.max() < 1e30:  # where float32 has room for it
            assert_near([x], [y], 1e-5, sizes=[size])


@needs_native
@pytest.mark.parametrize("shape", [(1, 70, 40, 16), (3, 33, 70, 5), (20, 17, 16, 8)])
def test_bits_do_not_depend_on_threads_nor_on_the_run(shape):
    torch.manual_seed(0)
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
@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2), (2, 5, 0, 0)])
def test_nothing_in_nothing_out(backend, shape):
    results = scan_results(inputs(*shape), backend, torch.float32)
    assert results[0].shape == shape[:3]
    for x, like in zip(results[1:], inputs(*shape), strict=True):
        assert x.shape == like.shape and not x.any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(
    ("name", "value", "worse"),
    [("A", -torch.inf, ()), ("u", torch.nan, ("y",)), ("dt", torch.inf, ("y",)),
     ("z", torch.nan, ("y",)), ("A", torch.nan, ("y",)), ("C", torch.inf, ("y",))],
)  # fmt: skip
def test_what_is_not_finite_is_not_hidden(backend, name, value, worse):
    """By the same numbers as the reference in float64: none where it has none."""
    tensors = inputs(1, 20, 5, 3)
    tensors[NAMES.index(name)][(0,) * tensors[NAMES.index(name)].dim()] = value
    found = scan_results(tensors, backend, torch.float32)
    right = scan_results(tensors, "reference", torch.float64)
    assert all(not right[("y", *NAMES).index(one)].isfinite().all() for one in worse)
    for one, x, y in zip(("y", *NAMES), found, right, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite()), one


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("gate", [True, False])
def test_without_states_the_input_passes_by_them(backend, gate):
    tensors = inputs(2, 7, 3, 0, gate=gate)
    y, *slopes = scan_results(tensors, backend, torch.float32)
    u, D, z = tensors[0], tensors[5], tensors[6] if gate else None
    assert_near([y], [u * D if z is None else u * D * F.silu(z)], 1e-6)
    assert slopes[0].any() and not slopes[1].any() and slopes[2].shape == (3, 0)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("double", NAMES)
def test_one_tensor_in_double_precision_is_taken_by_auto_and_loses_none(backend, double):
    tensors = inputs(2, 7, 3, 5)
    tensors = [x if name == double else x.float() for name, x in zip(NAMES, tensors, strict=True)]
    tensors = [x.requires_grad_() for x in tensors]
    results = with_gradients(lambda *x: selective_scan(*x, backend=backend), tensors)
    assert [x.dtype for x in results] == [tensors[0].dtype, *(x.dtype for x in tensors)]
    whole = [x.detach().double() for x in tensors]
    right, sizes = scan_results(whole, "reference", torch.float64), without_cancellation(whole)
    assert_near(results[1:], right[1:], 3e-7, NAMES[1:], sizes[1:])  # rounded but at the end
    assert_near(results[:1], right[:1], 3e-7, sizes=sizes)


@pytest.mark.parametrize("backend", ["auto", "reference", *FAST])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", NAMES)
def test_only_real_numbers_are_scanned(backend, kind, name):
    tensors = dict(zip(NAMES, (x.float() for x in inputs(2, 4, 3, 5)), strict=True))
    tensors[name] = tensors[name].to(kind)
    with pytest.raises(
        ValueError, match=rf"^{name} \(={kind} on cpu\) must be float.*; convert it"
    ):
        unchecked(selective_scan, **tensors, backend=backend)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2)])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_nothing_has_the_precision_of_the_input(shape, kind):
    tensors = [x.float() for x in inputs(*shape)]
    y = selective_scan(tensors[0].to(kind), *tensors[1:])
    assert y.dtype == kind and y.shape == shape[:3]


@needs_native
def test_a_second_derivative_is_refused():
    tensors = leaves(inputs(1, 4, 3, 2), torch.float32)
    y = selective_scan(*tensors, backend="native").square().sum()
    (slope,) = torch.autograd.grad(y, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()


@needs_native
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("u", lambda x: x.double(), r"u \(=torch.float64 on cpu\) must be float32"),
        ("A", lambda x: x.double(), r"A \(=torch.float64 on cpu\) must be"),
        ("z", lambda x: x.to("meta"), r"z \(=torch.float32 on meta\) must be .* on cpu .*convert"),
        ("u", lambda x: x[0], r"u and A \(of shapes \(4, 3\) and .*must have shapes \(b, n, d\)"),
        ("A", lambda x: x[:, 0], r"u and A \(of shapes .*\(3,\)\) must have shapes"),
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
@pytest.mark.parametrize("s", [0, 65])
def test_the_kernel_refuses_more_states_than_it_has_registers_for_and_none(s):
    tensors = [x.float() for x in inputs(1, 2, 3, s)]
    with pytest.raises(
        ValueError, match=rf"states of A \(={s}\) must be 1 to 64 here; use backend"
    ):
        selective_scan(*tensors, backend="native")


@needs_native
def test_the_kernel_called_by_its_name_refuses_shapes_that_disagree():
    tensors = [x.float() for x in inputs(2, 4, 3, 5)]
    with pytest.raises(ValueError, match=r"C \(of shape \(2, 4, 4\)\) must have shape \(2, 4, 5\)"):
        unchecked(scan_cpu.scan, *tensors[:4], tensors[4][..., :4], *tensors[5:])


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown backend 'cuda13'; valid: auto, reference, chu"):
        selective_scan(*inputs(1, 2, 3, 4), backend="cuda13")


def test_auto_takes_what_serves():
    assert fastest_backend(torch.zeros(1), 0) == "chunked"
    cpu = "native" if library() else "chunked"
    assert fastest_backend(torch.zeros(1), 16) == cpu
    assert fastest_backend(torch.zeros(1), 65) == "chunked"
    assert fastest_backend(torch.zeros(1).double(), 16) == "chunked"


@pytest.fixture
def installed(request, monkeypatch):
    """Only these packages, of those that a GPU's backend needs."""
    caches = scan_module._has_mamba_ssm, scan_module._has_triton, scan_module._without_mamba_ssm
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in request.param or None)
    yield request.param
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("installed", "backend"),
    [({"mamba_ssm", "triton"}, "cuda"), ({"triton"}, "triton"), (set(), "chunked")],
    indirect=["installed"],
)
def test_auto_on_a_gpu_takes_mamba_ssm_or_says_how_to_have_it(installed, backend, caplog):
    with FakeTensorMode():
        u = torch.empty(1, device="cuda")
    assert [fastest_backend(u, 16), fastest_backend(u, 16)] == [backend, backend]
    said = [r.message for r in caplog.records if "mamba_ssm is not installed" in r.message]
    assert len(said) == (backend != "cuda")
    assert all(f"slower backend {backend!r}" in m and "pip install --no-bu" in m for m in said)


@pytest.mark.parametrize(
    ("installed", "beyond"), [({"mamba_ssm", "triton"}, "triton"), ({"mamba_ssm"}, "chunked")],
    indirect=["installed"],
)  # fmt: skip
def test_auto_on_a_gpu_takes_what_serves_all_tensors(installed, beyond):
    with FakeTensorMode():
        u = torch.empty(1, device="cuda")
        double = u.double()
    assert fastest_backend(u, 256, u, u, None) == "cuda"
    assert fastest_backend(u, 257, u, u) == beyond, "mamba_ssm takes 256 states at most"
    for tensors in ((double, 16), (u, 16, u, double), (u, 0)):
        assert fastest_backend(*tensors) == "chunked"


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


@pytest.mark.parametrize("s", [0, 257])
def test_mamba_ssms_kernel_is_not_asked_for_what_it_refuses(mamba_ssm, s):
    tensors = [x.float() for x in inputs(1, 2, 3, s)]
    with pytest.raises(ValueError, match=rf"states of A \(={s}\) must be 1 to 256 here; use back"):
        selective_scan(*tensors, backend="cuda")
    tensors = [x.float() for x in inputs(1, 2, 3, 4)]
    with pytest.raises(
        ValueError, match=r"B \(=torch.float64 on cpu\) must be float32, bfloat16 or"
    ):
        selective_scan(*tensors[:3], tensors[3].double(), *tensors[4:], backend="cuda")
    assert not mamba_ssm


@pytest.mark.parametrize("gate", [True, False])
def test_mamba_ssms_kernel_is_called_as_its_documentation_says(mamba_ssm, gate):
    tensors = inputs(2, 9, 5, 3, gate=gate)
    found = scan_results(tensors, "cuda", torch.float32)
    right, sizes = scan_results(tensors, "reference", torch.float64), without_cancellation(tensors)
    assert_near(found, right, 1e-5, sizes=sizes)
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
