"""Products with weights: oneDNN's where it is the faster one, the same numbers wherever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scans import unchecked
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mambaflow.kernels import linear as linear_module
from mambaflow.kernels.linear import Linear, linear, linear_forward, onednn_is_faster, weight_grad

INFO = Path("/proc/cpuinfo")
HERE = onednn_is_faster(INFO.read_text() if INFO.exists() else "")
onednn = pytest.mark.skipif(not HERE, reason="oneDNN gains nothing on this processor")
AMD = "vendor_id : AuthenticAMD\nflags : fma avx2 avx512f"


class Calls(TorchDispatchMode):
    """How often one of the operators around oneDNN's product ran."""

    def __init__(self) -> None:
        super().__init__()
        self.onednn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.onednn += func.overloadpacket in (
            torch.ops.mambaflow.linear,
            torch.ops.mambaflow.weight_grad,
        )
        return func(*args, **(kwargs or {}))


def large(*rows: int, k: int = 160, n: int = 224) -> tuple[torch.Tensor, ...]:
    """An input, a weight and a bias beyond the least product that is oneDNN's."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((*rows, k), (n, k), (n,)))
    assert x.numel() * n >= linear_module.MIN_MULTIPLICATIONS
    return x, weight, bias


def slopes(function, *inputs, dtype=torch.float32):
    """The output of a product and the gradients of its inputs, in float64."""
    leaves = [v.to(dtype).requires_grad_() for v in inputs]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    return [v.double() for v in (y.detach(), *torch.autograd.grad(y, leaves, dy))]


def close(found, right, tolerance=1e-5):
    assert len(found) == len(right)
    for a, b in zip(found, right, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize(
    ("processor", "fit"),
    [
        (AMD, True),
        ("vendor_id : AuthenticAMD\nflags : fma avx2", False),
        ("vendor_id : GenuineIntel\nflags : avx512f", False),
        ("", False),
    ],
)
def test_only_amds_avx512_is_for_onednn(processor, fit, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for library in ("mkl", "mkldnn"):
        monkeypatch.setattr(f"torch.backends.{library}.is_available", lambda: True)
    assert onednn_is_faster(processor) is fit


@pytest.mark.parametrize("missing", ["mkl", "mkldnn"])
def test_without_both_libraries_there_is_no_choice(missing, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(f"torch.backends.{missing}.is_available", lambda: False)
    assert not onednn_is_faster(AMD)


@pytest.mark.parametrize(("value", "fit"), [("0", False), ("1", HERE), (None, HERE)])
def test_onednn_can_be_done_without(value, fit):
    environment = {k: v for k, v in os.environ.items() if k != "MAMBAFLOW_ONEDNN"}
    environment |= {} if value is None else {"MAMBAFLOW_ONEDNN": value}
    code = "from mambaflow.kernels import linear; print(linear._onednn_is_faster_here())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(fit), done.stderr


@onednn
def test_large_products_are_onednns_and_so_are_their_gradients():
    x, weight, bias = (v.requires_grad_() for v in large(2, 204))
    with Calls() as calls:
        y = linear(x, weight, bias)
        assert calls.onednn == 1
        y.sum().backward()
    assert calls.onednn == 3


@onednn
def test_a_large_product_is_made_by_onednn(monkeypatch):
    asked, real = [], torch.ops.mkldnn._linear_pointwise

    class Watched:
        @staticmethod
        def _linear_pointwise(*given):
            asked.append(given)
            return real(*given)

    monkeypatch.setattr(torch.ops, "mkldnn", Watched())
    x, weight, bias = large(512)
    close(
        [linear_forward(x, weight, bias).double()],
        [F.linear(*(v.double() for v in (x, weight, bias)))],
    )
    weight_grad(F.linear(x, weight), x)
    assert len(asked) == 2


@pytest.mark.parametrize("rows", [(512,), (2, 204), (3, 5, 64)])
@pytest.mark.parametrize("widths", [{}, {"k": 224, "n": 160}])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_and_its_gradients_are_those_of_float64(rows, widths, biased):
    inputs = large(*rows, **widths)[: 3 if biased else 2]
    close(slopes(linear, *inputs), slopes(F.linear, *inputs, dtype=torch.float64))


def test_a_strided_input_and_slope_are_read_as_they_lie():
    x, weight, bias = large(2, 408)
    first, turned = x[:, ::2], weight.t().contiguous().t()
    assert not first.is_contiguous() and not turned.is_contiguous()
    close(
        slopes(lambda *v: linear(*v).transpose(0, 1), first, turned, bias),
        slopes(lambda *v: F.linear(*v).transpose(0, 1), first, turned, bias, dtype=torch.float64),
    )


@onednn
@pytest.mark.parametrize("wanting", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for_are_made(wanting):
    inputs = large(512)
    inputs[wanting].requires_grad_()
    y = linear(*inputs)
    with Calls() as calls:
        y.sum().backward()
    assert calls.onednn == (wanting < 2)
    assert [v.grad is not None for v in inputs] == [i == wanting for i in range(3)]


@pytest.mark.parametrize("stride", [0, 2])
def test_a_strided_bias_is_added_as_it_lies(stride):
    x, weight, bias = large(512)
    bias = torch.as_strided(torch.cat((bias, bias)), (224,), (stride,))
    close([linear(x, weight, bias).double()], [F.linear(*(v.double() for v in (x, weight, bias)))])


def test_gradients_of_gradients_are_those_of_float64():
    def slope(function, dtype):
        x, weight, bias = (v.to(dtype).requires_grad_() for v in large(512))
        y = function(x, weight, bias)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return [v.double() for v in torch.autograd.grad(dx.square().sum(), (x, weight, bias))]

    close(slope(linear, torch.float32), slope(F.linear, torch.float64), 1e-4)


def test_an_output_may_be_changed_in_place_and_rows_be_one():
    torch.manual_seed(0)
    x, weight, bias = large(2, 256)
    y = linear(x.requires_grad_(), weight, bias).relu_()
    y.sum().backward()
    assert x.grad is not None and y.shape == (2, 256, 224)
    row, wide = torch.randn(2**12, requires_grad=True), torch.randn(2**11, 2**12)
    close(slopes(linear, row, wide), slopes(F.linear, row, wide, dtype=torch.float64))


@pytest.mark.parametrize("bias", [torch.randn(1), torch.randn(1, 224), torch.randn(224).double()])
def test_what_only_torchs_own_product_takes_or_refuses_is_left_to_it(bias):
    x, weight, _ = large(512)
    assert not linear_module.large(x, weight, bias) and not linear_module.large(x.long(), weight)
    assert not linear_module.large(x[:, 1:], weight)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        unchecked(linear, torch.cat((x, x), 1), weight)


COMPILED = """
import torch
from mambaflow.kernels import linear
from mambaflow.kernels.linear import Linear
torch.manual_seed(0)
layer, x = Linear(160, 224), torch.randn(2, 204, 160, requires_grad=True)
assert x.numel() * 224 >= linear.MIN_MULTIPLICATIONS
outcomes = []
for f in (layer, torch.compile(layer, fullgraph=True)):
    layer.zero_grad()
    y = f(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    y.square().sum().backward()
    outcomes.append([y, dx, layer.weight.grad.clone(), layer.bias.grad.clone()])
for a, b in zip(*outcomes):
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
"""


@pytest.mark.slow
def test_a_large_product_compiles():
    """In a process of its own: the checks of shapes break graphs."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@onednn
def test_the_operators_are_what_they_tell_torch():
    x, weight, bias = (v.requires_grad_() for v in large(512))
    torch.library.opcheck(linear_module._linear, (x, weight, bias))
    torch.library.opcheck(linear_module._linear, (x, weight, None))
    for n, k in ((224, 160), (160, 224)):
        dy, x = (torch.randn(512, w, requires_grad=True) for w in (n, k))
        torch.library.opcheck(linear_module._weight_grad, (dy, x))


@pytest.mark.parametrize("why", ["small", "float64", "autocast", "other processor"])
def test_everything_else_is_torchs_own_product_bitwise(why, monkeypatch):
    x, weight, bias = large(512)
    if why == "small":
        x = x[:8]
    if why == "float64":
        x, weight, bias = x.double(), weight.double(), bias.double()
    if why == "other processor":
        monkeypatch.setattr(linear_module, "_onednn_is_faster_here", lambda: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), Calls() as calls:
        found, right = linear(x, weight, bias), F.linear(x, weight, bias)
    assert calls.onednn == 0 and found.dtype == right.dtype and torch.equal(found, right)


def test_a_torch_without_the_operator_has_its_own_product(monkeypatch):
    class Bare:
        pass

    monkeypatch.setattr(linear_module, "_onednn_is_faster_here", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Bare())
    x, weight, bias = large(512)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_layer_is_torchs_with_its_weights_and_names():
    ours, theirs = Linear(160, 224), nn.Linear(160, 224)
    theirs.load_state_dict(ours.state_dict())
    x = large(512)[0]
    close([ours(x).double()], [theirs(x).double()])
