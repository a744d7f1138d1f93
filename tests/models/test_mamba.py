"""The Mamba block and its convolution: against torch, transformers and mamba_ssm's files."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scans import assert_near, leaves, needs_native, strided, unchecked, with_gradients
from torch import Tensor, nn

from mambaflow.kernels import scan_cpu
from mambaflow.kernels.build import library
from mambaflow.models.mamba import Mamba, causal_conv
from mambaflow.models.selective_scan import selective_scan

KINDS = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request, monkeypatch) -> bool:
    """With the compiled kernels, where there are any, and without them."""
    if not request.param:
        monkeypatch.setattr(scan_cpu, "is_supported", lambda *_, **__: False)
    return request.param


def conv_by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, weight, bias, groups=x.shape[-1])).transpose(1, 2)


def sizes_of_terms(tensors: list[Tensor]) -> list[Tensor]:
    """How large the convolution and its gradients were if no terms cancelled; silu and its slopes,
    of which the second is at most 1, are off by what their input is off by."""
    x, weight, bias = leaves([v.abs() for v in tensors], torch.float64)
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    y = F.conv1d(padded, weight, bias, groups=x.shape[-1]).transpose(1, 2)
    return with_gradients(lambda *_: y, [x, weight, bias], lambda dy: dy.abs() * (1 + y.detach()))


@needs_native
@pytest.mark.parametrize("taps", range(1, 9))
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 19), (7, 16), (40, 35)])
@pytest.mark.parametrize("layout", [0, 1, 2])
def test_the_convolution_is_torchs(taps, n, d, layout):
    torch.manual_seed(taps)
    shapes = [(3, n, d), (d, 1, taps), (d,)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    right = with_gradients(conv_by_torch, leaves(tensors, torch.float64))
    sizes = sizes_of_terms(tensors)
    work = lambda x, w, b: scan_cpu.conv(strided(x, layout), w, b)  # noqa: E731
    found = with_gradients(work, leaves(tensors, torch.float32))
    assert_near(found, right, 1e-5, ("x", "weight", "bias"), sizes)


def test_a_block_trains_under_autocast_with_and_without_the_kernels(native):
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_convolves_to_nothing(shape, kind, native):
    d = shape[2]
    tensors = [torch.randn(size) for size in (shape, (d, 1, 4), (d,))]
    results = with_gradients(causal_conv, leaves(tensors, kind))
    assert results[0].shape == shape and not any(x.any() for x in results)
    assert all(x.dtype == kind for x in results)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_a_block_gives_nothing_for_nothing_and_gradients_of_zero(shape, kind, autocast, native):
    block = Mamba(8).to(kind)
    tokens = torch.randn(*shape, 8, dtype=kind, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(tokens)
    y.sum().backward()
    assert y.shape == tokens.shape and tokens.grad.shape == tokens.shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "taps"), [(1, 2), (1, 8), (2, 4), (3, 8), (3, 9), (1, 20)])
def test_taps_beyond_the_first_token_see_zeros(n, taps, kind, native):
    torch.manual_seed(n)
    tensors = [torch.randn(size) for size in ((2, n, 5), (5, 1, taps), (5,))]
    right = with_gradients(conv_by_torch, leaves(tensors, torch.float64))
    found = with_gradients(causal_conv, leaves(tensors, kind))
    assert_near(found, right, 1e-5, ("x", "weight", "bias"), sizes_of_terms(tensors))


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_convolution_of_several_precisions_is_that_of_the_widest(which, other, native):
    torch.manual_seed(0)
    tensors = [torch.randn(size) for size in ((2, 6, 5), (5, 1, 4), (5,))]
    tensors[which] = tensors[which].to(other)
    y = causal_conv(*tensors)
    right = conv_by_torch(*(x.double() for x in tensors))
    assert y.dtype == tensors[0].dtype
    assert (y - right).abs().max() < 2 * torch.finfo(y.dtype).eps * right.abs().max() + 1e-5


@pytest.mark.parametrize("name", ["A_log", "D", "conv1d", "x_proj", "dt_proj"])
def test_a_block_with_one_part_in_double_precision_is_right_or_refused(name):
    """Parameters of the scan and the convolution are taken; a product wants one precision."""
    torch.manual_seed(0)
    block, tokens = Mamba(8), torch.randn(2, 6, 8)
    right = copy.deepcopy(block).double()(tokens.double())
    part = getattr(block, name)
    part.data = part.data.double() if isinstance(part, nn.Parameter) else part.double().weight.data
    if name.endswith("proj"):
        with pytest.raises((RuntimeError, ValueError), match="same dtype|to_dt .*one precision"):
            block(tokens)
    else:
        assert_near([block(tokens)], [right], 1e-5)


@pytest.mark.parametrize("size", ["d_model", "d_state", "d_conv", "expand"])
def test_a_block_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match=rf"^{size} \(=0\) must be at least 1$"):
        Mamba(**{"d_model": 8, size: 0})


@needs_native
@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 4, 3), (3, 1, 9), (3,), r"taps of weight \(=9\) must be 1 to 8"),
        ((2, 4, 3), (2, 1, 4), (3,), r"weight \(of shape"),
        ((2, 4, 3), (3, 1, 4), (2,), r"bias \(of shape"),
        ((4, 3), (3, 1, 4), (3,), r"x and weight \(of shapes .* must have shapes \(b, n, d\)"),
        ((2, 4, 3), (3, 1, 0), (3,), r"taps of weight \(=0\) must be at least 1"),
    ],
)
def test_the_convolution_refuses_what_it_would_misread(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        unchecked(
            scan_cpu.conv if weight[2] > 8 else causal_conv, *map(torch.zeros, (x, weight, bias))
        )


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_only_real_numbers_are_convolved(name, kind, native):
    tensors = {"x": torch.ones(2, 4, 3), "weight": torch.ones(3, 1, 4), "bias": torch.ones(3)}
    tensors[name] = tensors[name].to(kind)
    with pytest.raises(ValueError, match=rf"^{name} \(={kind} on cpu\) must be float64, float32"):
        unchecked(causal_conv, **tensors)


@needs_native
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("xz", lambda x: x[..., :-1], r"xz \(of shape \(2, 5, 31\)\) must have shape \(2, 5, 32\)"),
        ("A", lambda x: x[:, :3], r"to_ranks \(of shape \(33, 16\)\) must have shape \(7, 16\)"),
        (
            "A",
            lambda x: x[:, :0],
            r"states of A \(=0\) must be 1 to 64 here; use models.mamba.Mamba",
        ),
        ("A", lambda x: x.double(), r"A \(=torch.float64 on cpu\) must be float32, .*mamba.Mamba"),
        ("D", lambda x: x[:3], r"D \(of shape \(3,\)\) must have shape \(16,\)"),
    ],
)
def test_the_block_between_its_projections_refuses_what_it_would_misread(name, change, message):
    block = Mamba(8)
    tensors = {"xz": torch.randn(2, 5, 32), "A": -block.A_log.exp(), "D": block.D}
    tensors[name] = change(tensors[name])
    layers = block.conv1d, block.x_proj, block.dt_proj
    with pytest.raises(ValueError, match=message):
        unchecked(scan_cpu.mamba_inner, tensors["xz"], *layers, tensors["A"], tensors["D"])


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
        monkeypatch.setattr(Mamba, "_fuses", lambda *_, fuses=fuses: fuses)
        y = block(tokens)
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert len(calls) == 1
    assert_near(*results, 1e-5, [name for name, p in block.named_parameters() if p.requires_grad])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_is_fused(dtype):
    block, xz = Mamba(8), torch.zeros(1, 1, 32)
    assert block._fuses(xz, block.A_log) == (library() is not None)
    assert not block._fuses(xz.to(dtype), block.A_log)
    assert not block._fuses(xz, block.A_log.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):  # the projections are in half precision
        assert block(torch.randn(2, 5, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(("d_state", "d_conv"), [(65, 4), (16, 9), (80, 12)])
def test_a_block_too_large_for_the_kernel_runs_in_torch(d_state, d_conv):
    torch.manual_seed(0)
    block = Mamba(8, d_state=d_state, d_conv=d_conv)
    tokens, inner = torch.randn(2, 9, 8), []
    block.out_proj.register_forward_hook(lambda _, args, y: inner.append(args[0]))
    y, right = block(tokens), block.double()(tokens.double())
    size = inner[1].abs() @ block.out_proj.weight.abs().t()
    assert_near([y], [right], 1e-5, sizes=[size])


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
