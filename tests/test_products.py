"""Products with weights: oneDNN's where it is the faster one, the same numbers wherever."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mambaflow import products
from mambaflow.products import Linear, linear, product, suits

INFO = Path("/proc/cpuinfo")
HERE = suits(INFO.read_text() if INFO.exists() else "")
onednn = pytest.mark.skipif(not HERE, reason="oneDNN gains nothing on this processor")
AMD = "vendor_id : AuthenticAMD\nflags : fma avx2 avx512f"


class Calls(TorchDispatchMode):
    """How often oneDNN's product ran."""

    def __init__(self) -> None:
        super().__init__()
        self.onednn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.onednn += func.overloadpacket is torch.ops.mkldnn._linear_pointwise
        return func(*args, **(kwargs or {}))


def large(*rows: int, k: int = 160, n: int = 224) -> tuple[torch.Tensor, ...]:
    """An input, a weight and a bias beyond the least product that is oneDNN's."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((*rows, k), (n, k), (n,)))
    assert x.numel() * n >= products.LEAST
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
    assert suits(processor) is fit


@pytest.mark.parametrize("missing", ["mkl", "mkldnn"])
def test_without_both_libraries_there_is_no_choice(missing, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(f"torch.backends.{missing}.is_available", lambda: False)
    assert not suits(AMD)


@onednn
def test_large_products_are_onednns_and_so_are_their_gradients():
    x, weight, bias = (v.requires_grad_() for v in large(2, 204))
    with Calls() as calls:
        y = linear(x, weight, bias)
        assert calls.onednn == 1
        y.sum().backward()
        assert calls.onednn == 3
        product(x.detach(), weight.detach(), None)
    assert calls.onednn == 4


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


def test_only_the_gradients_that_are_asked_for_are_made():
    x, weight, bias = large(512)
    linear(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None


@pytest.mark.parametrize("why", ["small", "float64", "autocast", "other processor"])
def test_everything_else_is_torchs_own_product_bitwise(why, monkeypatch):
    x, weight, bias = large(512)
    if why == "small":
        x = x[:8]
    if why == "float64":
        x, weight, bias = x.double(), weight.double(), bias.double()
    if why == "other processor":
        monkeypatch.setattr(products, "_suits_here", lambda: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), Calls() as calls:
        found, right = linear(x, weight, bias), F.linear(x, weight, bias)
    assert calls.onednn == 0 and found.dtype == right.dtype and torch.equal(found, right)


def test_a_torch_without_the_operator_has_its_own_product(monkeypatch):
    class Bare:
        pass

    monkeypatch.setattr(products, "_suits_here", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Bare())
    x, weight, bias = large(512)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_layer_is_torchs_with_its_weights_and_names():
    ours, theirs = Linear(160, 224), nn.Linear(160, 224)
    theirs.load_state_dict(ours.state_dict())
    x = large(512)[0]
    close([ours(x).double()], [theirs(x).double()])
