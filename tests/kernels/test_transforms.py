"""Derivatives of every mode, and batches, through all that a kernel may serve: right or refused.

What float32 gives on CPU, where the kernels serve, is compared with float64, where torch's own
operations do; and those with difference quotients.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from mambaflow.kernels import attention_cpu, scan_cpu
from mambaflow.kernels import linear as linear_module
from mambaflow.kernels.build import library
from mambaflow.kernels.linear import Linear, linear
from mambaflow.kernels.transforms import is_transformed
from mambaflow.models.attention import attend
from mambaflow.models.mamba import Mamba, causal_conv
from mambaflow.models.selective_scan import fastest_backend, selective_scan

needs_native = pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")
Function = Callable[..., Tensor]


def layer(module: nn.Module) -> Function:
    """A layer as a function of its input and its parameters."""
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *values: functional_call(module, dict(zip(names, values, strict=True)), (x,))


def scan(u, dt, log_A, *rest, backend: str = "auto") -> Tensor:
    return selective_scan(u, dt, -log_A.exp(), *rest, backend=backend)


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters()]


SCAN = [(2, 6, 3), (2, 6, 3), (3, 2), (2, 6, 2), (2, 6, 2), (3,), (2, 6, 3)]
LAYERS = {"Linear": Linear(4, 5), "Mamba": Mamba(4, d_state=2)}
CASES: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "linear": (linear, [(2, 3, 4), (5, 4), (5,)]),
    "Linear": (layer(LAYERS["Linear"]), [(2, 3, 4), *shapes(LAYERS["Linear"])]),
    "attend": (attend, [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 3)]),
    "selective_scan": (scan, SCAN),
    "selective_scan without a gate": (scan, SCAN[:6]),
    "causal_conv": (causal_conv, [(2, 6, 3), (3, 1, 4), (3,)]),
    "Mamba": (layer(LAYERS["Mamba"]), [(2, 5, 4), *shapes(LAYERS["Mamba"])]),
}


def drawn(sizes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    """In float64, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).double() for size in sizes]


@pytest.fixture(autouse=True)
def small_products_by_onednn(monkeypatch):
    """The operator around oneDNN's product serves small ones too, wherever torch has it."""
    monkeypatch.setattr(linear_module, "MIN_MULTIPLICATIONS", 0)
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        monkeypatch.setattr(linear_module, "_onednn_is_faster_here", lambda: True)


def by_forward_ad(f: Function, x: list[Tensor], v: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, v))).tangent


def weighed(f: Function) -> Function:
    """A number whose slope is of every output, of a second derivative that is not 0."""
    return lambda *x: f(*x).square().sum()


def batched(x: list[Tensor]) -> list[Tensor]:
    return [torch.stack((one, 0.5 * one)) for one in x]


MODES: dict[str, Callable[[Function, list[Tensor], list[Tensor]], list[Tensor]]] = {
    "jvp": lambda f, x, v: list(jvp(f, tuple(x), tuple(v))),
    "forward_ad": lambda f, x, v: [by_forward_ad(f, x, v)],
    "grad": lambda f, x, v: [*grad(weighed(f), tuple(range(len(x))))(*x)],
    "vjp": lambda f, x, v: [*vjp(f, *x)[1](f(*x))],
    "vmap": lambda f, x, v: [vmap(f)(*batched(x))],
    "vmap of some": lambda f, x, v: [vmap(lambda u: f(u, *x[1:]))(*batched(x[:1]))],
    "vmap of grad": lambda f, x, v: [vmap(grad(weighed(f)))(*batched(x))],
    "jacfwd": lambda f, x, v: [jacfwd(f)(*x)],
    "jacrev": lambda f, x, v: [jacrev(f)(*x)],
    "hessian": lambda f, x, v: [hessian(weighed(f))(*x)],
    "grad of grad": lambda f, x, v: [grad(weighed(grad(weighed(f))))(*x)],
    "grad of jvp": lambda f, x, v: [
        grad(weighed(lambda *y: jvp(f, y, tuple(v))[1]))(*x),
    ],
    "jvp of jvp": lambda f, x, v: [
        jvp(lambda *y: jvp(f, y, tuple(v))[1], tuple(x), tuple(v))[1],
    ],
    "functional.jacobian": lambda f, x, v: [
        torch.autograd.functional.jacobian(
            lambda u: f(u, *x[1:]), x[0], vectorize=True, strategy="forward-mode"
        )
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_a_tangent_is_the_difference_quotient(case):
    f, sizes = CASES[case]
    x, v, h = drawn(sizes, 1), drawn(sizes, 2), 1e-5
    moved = [[a + sign * h * b for a, b in zip(x, v, strict=True)] for sign in (1, -1)]
    quotient = (f(*moved[0]) - f(*moved[1])) / (2 * h)
    for tangent in (jvp(f, tuple(x), tuple(v))[1], by_forward_ad(f, x, v)):
        assert (tangent - quotient).abs().max() < 1e-8 * quotient.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_mode_is_right_where_kernels_serve(case, mode):
    f, sizes = CASES[case]
    x, v = drawn(sizes, 1), drawn(sizes, 2)
    right = MODES[mode](f, x, v)
    found = MODES[mode](f, [a.float() for a in x], [a.float() for a in v])
    for one, other in zip(found, right, strict=True):
        assert one.dtype == torch.float32 and other.dtype == torch.float64
        assert other.abs().max() > 1e-3
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


class Ours(TorchDispatchMode):
    """The operators of our own that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mambaflow":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_kernels_serve_before_and_after_a_transform(case):
    """Else the tests above would compare torch's operations with themselves."""
    f, sizes = CASES[case]
    x, v = ([a.float() for a in drawn(sizes, seed)] for seed in (1, 2))
    if "inear" in case and not linear_module._onednn():
        pytest.skip("this torch has no product by oneDNN")
    for _ in range(2):
        with Ours() as ours:
            f(*x)
        assert ours.names and not is_transformed()
        jvp(f, tuple(x), tuple(v)), by_forward_ad(f, x, v), vmap(f)(*batched(x))


def test_a_transform_is_seen_at_any_depth_and_not_after_it():
    seen = []

    def look(x):
        seen.append(is_transformed())
        return x.sum()

    x = torch.ones(3)
    look(x), grad(look)(x), vmap(look)(x), vmap(grad(look))(x[None]), jvp(look, (x,), (x,)), look(x)
    with forward_ad.dual_level():
        look(x)
    look(x)
    assert seen == [False, True, True, True, True, False, True, False]


def test_auto_takes_torchs_operations_in_a_transform():
    chosen = []
    vmap(lambda x: chosen.append(fastest_backend(x, 16)) or x)(torch.ones(2, 3))
    assert chosen == ["chunked"]


def mamba_inner(xz: Tensor) -> Tensor:
    block = LAYERS["Mamba"]
    rates = -block.A_log.detach().exp()
    return scan_cpu.mamba_inner(xz, block.conv1d, block.x_proj, block.dt_proj, rates, block.D)


def triton_scan(*x: Tensor) -> Tensor:
    pytest.importorskip("triton")
    return scan(*x, backend="triton")


KERNELS: dict[str, tuple[Function, list[tuple[int, ...]], str]] = {
    "the native scan": (lambda *x: scan(*x, backend="native"), SCAN, "backend 'auto'"),
    "the native convolution": (scan_cpu.conv, CASES["causal_conv"][1], "mamba.causal_conv"),
    "the native Mamba block": (mamba_inner, [(2, 5, 16)], "mamba.Mamba"),
    "the native attention": (attention_cpu.attend, CASES["attend"][1], "attention.attend"),
    "the Triton scan": (triton_scan, SCAN, "backend 'auto'"),
}
REFUSED = ["jvp", "forward_ad", "grad", "vmap of grad", "jacfwd", "jacrev", "hessian",
           "functional.jacobian"]  # fmt: skip


@needs_native
@pytest.mark.parametrize("mode", REFUSED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_called_by_its_name_refuses_what_it_would_lose(kernel, mode):
    f, sizes, cure = KERNELS[kernel]
    x, v = ([a.float() for a in drawn(sizes, seed)] for seed in (1, 2))
    with pytest.raises(NotImplementedError, match=f"^{kernel} has no rule for .*{cure}"):
        MODES[mode](f, x, v)


@needs_native
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kernel", [name for name in KERNELS if "Triton" not in name])
def test_a_kernel_called_by_its_name_serves_what_carries_no_tangent(kernel):
    f, sizes, _ = KERNELS[kernel]
    x = [a.float() for a in drawn(sizes, 1)]
    each = torch.stack([f(*one) for one in zip(*batched(x), strict=True)])
    torch.testing.assert_close(vmap(f)(*batched(x)), each, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        # Not to the bit: products add up by where their rows lie in memory, and these are copies.
        torch.testing.assert_close(f(*x), each[0], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("case", [case for case in CASES if "inear" not in case])
def test_a_gradient_by_a_kernel_refuses_a_tangent_that_comes_back(case):
    f, sizes = CASES[case]
    x = [a.float().requires_grad_() for a in drawn(sizes, 1)]
    y = f(*x)
    back = lambda dy: torch.autograd.grad(y, x[0], dy, retain_graph=True)[0]  # noqa: E731
    ones = torch.ones_like(y)
    for derivative in (by_forward_ad, lambda f, x, v: jvp(f, tuple(x), tuple(v))):
        with pytest.raises(NotImplementedError, match="gradient.* has no rule for forward-mode"):
            derivative(back, [ones], [ones])
    with forward_ad.dual_level():  # nothing is lost of what has no tangent
        assert torch.equal(back(ones), back(ones))


def test_a_products_gradient_takes_a_tangent_that_comes_back():
    x, weight, dy, tangent = drawn([(3, 4), (5, 4), (3, 5), (3, 5)], 1)
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    y = linear(x, weight)

    def back(dy):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(y, (x, weight), dy, retain_graph=True)]
        )

    right = back(tangent.float())  # it is linear
    by_jvp = jvp(back, (dy.float(),), (tangent.float(),))[1]
    for found in (by_forward_ad(back, [dy.float()], [tangent.float()]), by_jvp):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=0)


COMPILED = """
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from mambaflow.kernels import linear
from mambaflow.models.attention import attend
from mambaflow.models.mamba import Mamba
linear.MIN_MULTIPLICATIONS = 0
torch.manual_seed(0)
block, x, v = Mamba(16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
f = lambda x: attend(*[block(x)[:, None]] * 3)
ways = [
    lambda x: f(x),
    lambda x: jvp(f, (x,), (v,))[1],
    lambda x: vmap(f)(x[None]),
    lambda x: grad(lambda x: f(x).square().sum())(x),
    lambda x: f(x),
]
for way in ways:
    whole = torch.compile(way, backend="aot_eager", fullgraph=True)
    one, other = way(x), whole(x)
    assert (one - other).abs().max() <= 1e-5 * one.abs().max() and one.abs().max() > 0
whole = torch.compile(f, backend="aot_eager", fullgraph=True)
for _ in range(2):
    torch.testing.assert_close(whole(x), f(x))
    with forward_ad.dual_level():
        torch.testing.assert_close(whole(x), f(x))
        try:  # torch refuses tangents that come from outside
            whole(forward_ad.make_dual(x, v))
            raise SystemExit("a tangent went into a compiled graph unseen")
        except (NotImplementedError, torch._dynamo.exc.Unsupported) as error:
            assert "forward mode" in str(error) or "dual tensor" in str(error), error
"""


@pytest.mark.slow
def test_transforms_inside_a_compiled_function_are_one_graph_and_right():
    """In a process of its own: the checks of shapes break graphs."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
