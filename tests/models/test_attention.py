"""Attention, its windows and its kernel against their definitions."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mambaflow.kernels import attention_cpu
from mambaflow.kernels.build import library
from mambaflow.models import attention as room
from mambaflow.models.attention import Attention, attend

native = pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")


def by_definition(query, key, value):
    return (query @ key.mT).softmax(-1) @ value


def made(b, h, n, m, e, f, seed=0, size=1.0):
    """Query, key and value in float64, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, e), (b, h, m, e), (b, h, m, f)
    sizes = size * e**-0.25, size * e**-0.25, 1.0
    drawn = [
        s * torch.randn(shape, generator=generator) for shape, s in zip(shapes, sizes, strict=True)
    ]
    return [x.double() for x in drawn]


def results(function, inputs, dtype, wanting=(0, 1, 2)):
    """The output of an attention and the gradients of the inputs that want one, in float64."""
    leaves = [x.to(dtype).requires_grad_(i in wanting) for i, x in enumerate(inputs)]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(9)
    slope = torch.randn(y.shape, generator=generator).to(dtype)
    found = torch.autograd.grad(y, [leaves[i] for i in wanting], slope)
    return [x.detach().double() for x in (y, *found)]


def assert_near(found, right, tolerance=1e-5):
    assert len(found) == len(right)
    for a, b in zip(found, right, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# Blocks of 48 queries, tiles of 256 keys, rows in fours, vectors of 4, 8 or 16.
SHAPES = [
    (2, 2, 3, 5, 7, 9), (1, 1, 2, 1, 1, 1), (1, 2, 50, 300, 35, 35), (2, 1, 204, 204, 35, 35),
    (1, 3, 97, 513, 3, 15), (1, 1, 48, 256, 16, 64), (1, 1, 49, 257, 17, 65), (3, 1, 1, 700, 4, 4),
]  # fmt: skip


@native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_and_its_gradients_are_the_definition(shape):
    inputs = made(*shape)
    found = results(attention_cpu.attend, inputs, torch.float32)
    assert_near(found, results(by_definition, inputs, torch.float64))


LAYOUTS = ["dense", "heads last", "shared", "skipping", "turned"]


@native
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, most) for most in (3, 3, 120, 600, 40, 40)]),
    layout=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    wanting=st.sampled_from([(0,), (0, 1, 2), (1,), (0, 2)]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(sizes, layout, wanting, seed):
    def laid(x, how):
        if how == "heads last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if how == "shared":
            return x[:, :1].expand_as(x)
        if how == "turned":
            return x.mT.contiguous().mT
        return torch.stack((x, x), 3)[:, :, :, 0] if how == "skipping" else x

    views = lambda f: lambda *v: f(*map(laid, v, layout))  # noqa: E731
    inputs = made(*sizes, seed=seed)
    found = results(views(attention_cpu.attend), inputs, torch.float32, wanting)
    right = results(views(by_definition), inputs, torch.float64, wanting)
    scale = max(float(x.abs().max()) for x in right[1:])
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() <= 1e-6 + 2e-5 * max(float(b.abs().max()), scale)


@native
def test_scores_as_large_as_narrow_windows_make_them_neither_overflow_nor_blur():
    inputs = made(2, 2, 60, 300, 3, 5, size=60.0)
    scores = inputs[0] @ inputs[1].mT
    assert scores.abs().max() > 5_000, "exp of these is no float"
    found = results(attention_cpu.attend, inputs, torch.float32)
    assert all(x.isfinite().all() for x in found)
    assert_near(found, results(by_definition, inputs, torch.float64), 2e-3)  # as scores are rounded


@native
def test_what_is_not_a_number_is_not_hidden():
    query, key, value = (x.float() for x in made(1, 1, 60, 300, 4, 4))
    query[0, 0, 7, 2] = math.nan
    y = attention_cpu.attend(query, key, value)
    assert y[0, 0, 7].isnan().all() and y.isfinite().sum() == 59 * 4
    value[0, 0, 280, 1] = math.nan
    assert attention_cpu.attend(query, key, value)[0, 0, :, 1].isnan().all()


@native
@pytest.mark.parametrize("m", [5, 16, 256, 300, 512])
def test_scores_beyond_all_bounds_are_torchs_answer(m):
    value = torch.randn(1, 1, m, 3)
    for first, rest in ((-1e38, -1e38), (-2e38, 0.0), (-math.inf, 1.0), (-math.inf, -math.inf)):
        key = torch.full((1, 1, m, 1), rest)
        key[:, :, : max(1, m - 4)] = first
        query = torch.ones(1, 1, 2, 1)
        y = attention_cpu.attend(query, key, value)
        torch.testing.assert_close(y, by_definition(query, key, value), equal_nan=True)


@native
def test_a_row_has_the_same_bits_whatever_is_beside_it():
    query, key, value = (x.float() for x in made(1, 2, 204, 517, 35, 35))
    whole = attention_cpu.attend(query, key, value)
    for low, high in ((0, 1), (5, 77), (203, 204)):
        part = attention_cpu.attend(query[:, :, low:high], key, value)
        assert torch.equal(part, whole[:, :, low:high])


@native
def test_threads_do_not_change_the_bits():
    inputs, before = made(1, 3, 204, 300, 35, 35), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(attention_cpu.attend, inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], one, strict=True))


@native
def test_keys_that_want_no_gradients_cost_none(monkeypatch):
    inputs = made(1, 2, 30, 40, 3, 15)
    whole = results(attention_cpu.attend, inputs, torch.float32)
    given, real = [], attention_cpu._through
    monkeypatch.setattr(
        attention_cpu, "_through", lambda *x: given.append((x[-1], real(*x))) or given[-1][1]
    )
    alone = results(attention_cpu.attend, inputs, torch.float32, wanting=(0,))
    ((keys, found),) = given
    assert not keys and len(found) == 1 and torch.equal(alone[1], whole[1])


MEMORY = """
import resource, torch
from mambaflow.kernels.attention_cpu import attend
torch.set_num_threads(2)
query, key, value = (torch.randn(1, 1, 20_000, 4, requires_grad=True) for _ in range(3))
few = attend(query[:, :, :50], key[:, :, :50], value[:, :, :50]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(query, key, value).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@native
def test_no_matrix_of_scores_is_kept():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 20_000 * 20_000 * 4 / 20


@native
@pytest.mark.parametrize("sizes", [(0, 2, 3, 5, 4, 4), (2, 2, 0, 5, 4, 4), (2, 0, 3, 5, 4, 4)])
def test_nothing_asked_is_nothing_answered(sizes):
    y, *slopes = results(attention_cpu.attend, made(*sizes), torch.float32)
    assert y.numel() == 0 and all(not x.any() for x in slopes)


@native
def test_what_the_kernel_would_misread_is_refused():
    query, key, value = made(1, 1, 3, 5, 4, 4)
    with pytest.raises(ValueError, match="query .*float64.* must be float32 on cpu"):
        attention_cpu.attend(query, key.float(), value.float())
    with pytest.raises(ValueError, match="value .*meta.* must be float32 on cpu"):
        attention_cpu.attend(query.float(), key.float(), value.float().to("meta"))
    for wrong in (
        (query[:, :, None], key, value), (query, key.expand(1, 2, 5, 4), value),
        (query, key[..., :3], value), (query, key, value[:, :, :4]), (query[0], key[0], value[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"query, key, value .* must be \(b, h, n, e\)"):
            attention_cpu._refuse_misread(*(x.float() for x in wrong))  # jaxtyping is before
    with pytest.raises(ValueError, match="key .*0 tokens.* at least one"):
        attention_cpu.attend(query.float(), key[:, :, :0].float(), value[:, :, :0].float())


@native
def test_an_output_that_nothing_came_back_to_gives_nothing_back():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return None

    inputs = [x.float().requires_grad_() for x in made(1, 1, 3, 5, 4, 4)]
    extra = torch.ones(1, requires_grad=True)
    (Stop.apply(attention_cpu.attend(*inputs)).sum() + extra).backward()
    assert extra.grad is not None and all(x.grad is None for x in inputs)


NO_MEMORY = """
import resource, torch
from mambaflow.kernels.attention_cpu import attend
attend(*(torch.randn(1, 1, 4, 8) for _ in range(3)))
query, key, value = torch.randn(1, 1, 1, 64), *(torch.zeros(1, 1, 1, 64) for _ in range(2))
key, value = (x.expand(1, 1, 2_000_000, 64) for x in (key, value))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
try:
    attend(query, key, value)
except MemoryError as error:
    print(error)
"""


@native
@pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
def test_without_memory_for_the_keys_the_process_lives_on():
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no memory for attention over 2,000,000 keys"


LIGHT = ("test_schema", "test_autograd_registration", "test_faketensor")


@native
@pytest.mark.parametrize("keep", [True, False])
def test_the_operator_is_what_it_tells_torch(keep):
    """Shapes without data, gradients, aliases: torch's own checks of an operator."""
    inputs = [x.float().requires_grad_() for x in made(1, 2, 5, 9, 4, 3)]
    checks = (*LIGHT, "test_aot_dispatch_static") if keep else LIGHT  # what is kept has the slopes
    torch.library.opcheck(attention_cpu._attend, (*inputs, keep), test_utils=checks)


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(attention_cpu, "is_supported", lambda query: False)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(4, 4), (3, 15), (35, 35), (16, 5)])
def test_without_the_kernel_torchs_is_the_same(widths, precision, no_kernel):
    inputs = made(2, 2, 30, 40, *widths)
    right = results(by_definition, inputs, torch.float64)
    assert_near(results(attend, inputs, precision), right)
    with torch.no_grad():
        assert_near([attend(*[x.to(precision) for x in inputs]).double()], right[:1])


@pytest.mark.parametrize(
    ("n", "k", "plain"), [(204, 204, True), (300, 430, True), (400, 400, False)]
)
def test_few_tokens_in_training_attend_as_the_fused_attention_does(
    n, k, plain, monkeypatch, no_kernel
):
    monkeypatch.setattr(room, "PLAIN", 2 * 3 * 300 * 430)
    torch.manual_seed(0)
    given = [torch.randn(2, 3, m, 8, requires_grad=True) for m in (n, k, k)]
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, **y: calls.append(1) or fused(*x, **y)
    )
    results = []
    for attention in (attend, lambda *x: fused(*x, scale=1.0)):
        y = attention(*given)
        results.append([y, *torch.autograd.grad(y.sin().sum(), given)])
    assert bool(calls) == (not plain)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        attend(*given)
    assert len(calls) == 1 + (not plain), "without gradients the scores are never kept"


def windowed_by_definition(attention, tokens, xy, other, other_xy, rgb):
    """softmax(q.k / sqrt(e) - |x - y|^2 / 2 s^2) over a full matrix, in float64."""
    split = lambda z: z.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # noqa: E731
    query = split(attention.query(tokens))
    key, value = (split(z) for z in attention.key_value(other).chunk(2, -1))
    far = (xy[:, None, :, None] - other_xy[:, None, None]).square().sum(-1)
    width = attention.log_width.exp()[:, None, None]
    logits = query @ key.mT / math.sqrt(query.shape[-1]) - far / (2 * width**2)
    weights = logits.softmax(-1)
    colours = (weights @ rgb[:, None]).transpose(1, 2).flatten(2)
    return attention.out((weights @ value).transpose(1, 2).flatten(2)) + attention.colours(colours)


@pytest.mark.parametrize("training", [True, False])
def test_windows_equal_their_definition_with_a_full_matrix(training):
    torch.manual_seed(0)
    attention = Attention(32, 4, windows=True)
    tokens, other = torch.randn(2, 7, 32), torch.randn(2, 11, 32)
    xy, other_xy, rgb = torch.rand(2, 7, 2), torch.rand(2, 11, 2), torch.randn(2, 11, 3)
    with torch.set_grad_enabled(training):
        got = attention(tokens, xy, attention.kv(other, other_xy, rgb))
    doubles = [z.double() for z in (tokens, xy, other, other_xy, rgb)]
    want = windowed_by_definition(attention.double(), *doubles)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_a_narrow_window_reads_the_nearest_colour():
    torch.manual_seed(1)
    attention = Attention(16, 2, windows=True)
    with torch.no_grad():
        attention.log_width.fill_(math.log(0.003))
    side = torch.arange(7) / 7
    other_xy, rgb = torch.cartesian_prod(side, side)[None], torch.randn(1, 49, 3)
    kv = attention.kv(torch.randn(1, 49, 16), other_xy, rgb)
    _, colours = attention.read(torch.randn(1, 49, 16), other_xy, kv)
    torch.testing.assert_close(colours.unflatten(-1, (2, 3))[:, :, 0], rgb, atol=1e-3, rtol=1e-3)


def test_windows_keep_their_place_under_bf16_autocast():
    torch.manual_seed(2)
    attention = Attention(32, 4, windows=True)
    xy, other_xy, rgb = torch.rand(1, 64, 2), torch.rand(1, 99, 2), torch.randn(1, 99, 3)
    tokens, other = torch.zeros(1, 64, 32), torch.zeros(1, 99, 32)  # windows alone decide
    exact = attention.read(tokens, xy, attention.kv(other, other_xy, rgb))[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention.read(tokens, xy, attention.kv(other, other_xy, rgb))[1]
    torch.testing.assert_close(rounded, exact, atol=2e-3, rtol=0)
