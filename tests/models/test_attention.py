"""Attention, its windows and its kernel against their definitions."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scans import unchecked

from mambaflow.kernels import attention_cpu
from mambaflow.kernels.build import library
from mambaflow.models import attention as attention_module
from mambaflow.models.attention import Attention, attend

FLOAT32 = torch.finfo(torch.float32)
# The worst case is the number of terms; but errors have random signs, and 6 was the most that was
# seen in 5,000 shapes.
ROUNDINGS = 16
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


def slope_of(y):
    """What comes back to an output: the same in every precision."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)


def results(function, inputs, dtype, wanting=(0, 1, 2)):
    """The output of an attention and the gradients of the inputs that want one, in float64."""
    leaves = [x.to(dtype).requires_grad_(i in wanting) for i, x in enumerate(inputs)]
    y = function(*leaves)
    found = torch.autograd.grad(y, [leaves[i] for i in wanting], slope_of(y))
    return [x.detach().double() for x in (y, *found)]


def without_cancellation(query, key, value, dy):
    """How large the output and the gradients were if no terms cancelled, in float64: what rounding
    errors are fractions of.

    A score is off by eps times the sum of its terms' sizes, and so, relatively, is its exponential.
    What is below float32's least normal number counts as that.
    """
    share = (query @ key.mT).softmax(-1) + FLOAT32.tiny
    loud = share * (1 + (query.abs() @ key.abs().mT).amax(-1, keepdim=True))
    mean = (dy.abs() * (share @ value.abs())).sum(-1, keepdim=True)
    dscore = loud * (dy.abs() @ value.abs().mT + mean) + FLOAT32.tiny
    found = loud @ value.abs(), dscore @ key.abs(), dscore.mT @ query.abs(), loud.mT @ dy.abs()
    return [x + FLOAT32.tiny for x in found]


def sizes_of_terms(inputs, wanting=(0, 1, 2), views=lambda *v: v):
    """`without_cancellation` of views of the inputs, its gradients added up as those are."""
    leaves = [x.requires_grad_() for x in (x.clone() for x in inputs)]
    seen = views(*leaves)
    with torch.no_grad():
        y, *slopes = without_cancellation(*seen, slope_of(by_definition(*seen)))
    return [y, *torch.autograd.grad(seen, [leaves[i] for i in wanting], slopes)]


def assert_near(found, right, sizes, kind=FLOAT32):
    """Every number within ROUNDINGS times eps of what its terms add up to."""
    assert len(found) == len(right) == len(sizes)
    for a, b, size in zip(found, right, sizes, strict=True):
        assert a.shape == b.shape
        off, rounding = (a.double() - b.double()).abs(), kind.eps * size
        assert (off <= ROUNDINGS * rounding).all(), f"off by {(off / rounding).max()} roundings"


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
    assert_near(found, results(by_definition, inputs, torch.float64), sizes_of_terms(inputs))


LAYOUTS = ["dense", "heads last", "shared", "skipping", "turned"]


@native
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, most) for most in (3, 3, 120, 600, 40, 40)]),
    layout=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    wanting=st.sampled_from([(0,), (0, 1, 2), (1,), (0, 2)]),
    size=st.sampled_from([1.0, 5.0, 60.0]),
    seed=st.integers(0, 2**31),
)
@example((1, 1, 2, 1, 1, 13), ("dense",) * 3, (0, 1, 2), 1.0, 0)  # one key: gradients cancel
def test_any_shape_and_layout(sizes, layout, wanting, size, seed):
    def laid(x, how):
        if how == "heads last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if how == "shared":
            return x[:, :1].expand_as(x)
        if how == "turned":
            return x.mT.contiguous().mT
        return torch.stack((x, x), 3)[:, :, :, 0] if how == "skipping" else x

    views = lambda *v: tuple(map(laid, v, layout))  # noqa: E731
    inputs = made(*sizes, seed=seed, size=size)
    found = results(lambda *v: attention_cpu.attend(*views(*v)), inputs, torch.float32, wanting)
    right = results(lambda *v: by_definition(*views(*v)), inputs, torch.float64, wanting)
    assert_near(found, right, sizes_of_terms(inputs, wanting, views))


@native
def test_scores_as_large_as_narrow_windows_make_them_neither_overflow_nor_blur():
    inputs = made(2, 2, 60, 300, 3, 5, size=60.0)
    scores = inputs[0] @ inputs[1].mT
    assert scores.abs().max() > 5_000, "exp of these is no float"
    found = results(attention_cpu.attend, inputs, torch.float32)
    assert all(x.isfinite().all() for x in found)
    assert_near(found, results(by_definition, inputs, torch.float64), sizes_of_terms(inputs))


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
    torch.manual_seed(0)
    value = torch.randn(1, 1, m, 3)
    for first, rest in ((-1e38, -1e38), (-2e38, 0.0), (-math.inf, 1.0), (-math.inf, -math.inf)):
        key = torch.full((1, 1, m, 1), rest)
        key[:, :, : max(1, m - 4)] = first
        query = torch.ones(1, 1, 2, 1)
        y, right = attention_cpu.attend(query, key, value), by_definition(query, key, value)
        assert torch.equal(y.isnan(), right.isnan())
        size = by_definition(query, key, value.abs())
        assert_near([y.nan_to_num()], [right.nan_to_num()], [size.nan_to_num(1.0)])


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
    calls, real = [], attention_cpu._attend_backward_op
    watched = lambda *x: calls.append((x[-1], real(*x))) or calls[-1][1]  # noqa: E731
    monkeypatch.setattr(attention_cpu, "_attend_backward_op", watched)
    alone = results(attention_cpu.attend, inputs, torch.float32, wanting=(0,))
    ((keys, found),) = calls
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
            attention_cpu.refuse_shapes(*(x.float() for x in wrong))  # jaxtyping is before
    with pytest.raises(ValueError, match="key .*0 tokens.* at least one"):
        attention_cpu.attend(query.float(), key[:, :, :0].float(), value[:, :, :0].float())


@native
@pytest.mark.parametrize(("e", "f"), [(0, 3), (3, 0), (0, 0)])
def test_without_features_scores_are_even_or_nothing_is_read(e, f):
    query, key, value = made(2, 2, 5, 9, max(e, 1), max(f, 1))
    inputs = [query[..., :e], key[..., :e], value[..., :f]]
    found = results(attention_cpu.attend, inputs, torch.float32)
    assert_near(found, results(by_definition, inputs, torch.float64), sizes_of_terms(inputs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "key .*0 tokens.* at least one"),
        (lambda q, k, v: (q, k[:, :1], v), r"query, key, value .* must be \(b, h, n, e\)"),
        (
            lambda q, k, v: (q.long(), k, v),
            r"query \(=torch.int64 on cpu\) must be of real numbers",
        ),
        (
            lambda q, k, v: (q, k, v.long()),
            r"value \(=torch.int64 on cpu\) must be of real numbers",
        ),
        (
            lambda q, k, v: (q, k.double(), v),
            r"key \(=torch.float64 .* as query is \(=torch.float32",
        ),
        (lambda q, k, v: (q, k, v.to("meta")), r"value \(=torch.float32 on meta\) .* convert it"),
    ],
)
def test_attention_refuses_the_same_by_name_with_and_without_its_kernel(
    change, message, kernel, training, monkeypatch
):
    if not kernel:
        monkeypatch.setattr(attention_cpu, "is_supported", lambda query: False)
    tensors = change(*(x.float() for x in made(1, 2, 3, 5, 4, 4)))
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=message):
        unchecked(attend, *tensors)


def test_under_autocast_several_precisions_are_one():
    query, key, value = (x.float() for x in made(1, 2, 3, 5, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(query, key.bfloat16(), value)
    assert y.dtype == torch.bfloat16
    assert (y - by_definition(query, key, value)).abs().max() < 0.05


@pytest.mark.parametrize(("width", "heads"), [(10, 4), (4, 0), (0, 1)])
def test_heads_share_a_width_evenly(width, heads):
    with pytest.raises(
        ValueError, match=rf"width \(={width}\) must be a multiple of heads \(={heads}"
    ):
        Attention(width, heads, windows=False)


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
    right, sizes = results(by_definition, inputs, torch.float64), sizes_of_terms(inputs)
    assert_near(results(attend, inputs, precision), right, sizes, torch.finfo(precision))
    with torch.no_grad():
        y = attend(*[x.to(precision) for x in inputs])
        assert_near([y], right[:1], sizes[:1], torch.finfo(precision))


@pytest.mark.parametrize(
    ("n", "k", "plain"), [(204, 204, True), (300, 430, True), (400, 400, False)]
)
def test_few_tokens_in_training_attend_as_the_fused_attention_does(
    n, k, plain, monkeypatch, no_kernel
):
    monkeypatch.setattr(attention_module, "PLAIN", 2 * 3 * 300 * 430)
    inputs, calls, fused = made(2, 3, n, k, 8, 8), [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, **y: calls.append(1) or fused(*x, **y)
    )
    found = results(attend, inputs, torch.float32)
    assert bool(calls) == (not plain)
    right = results(lambda *x: fused(*x, scale=1.0), inputs, torch.float32)
    assert_near(found, right, [2 * size for size in sizes_of_terms(inputs)])  # both are rounded
    with torch.no_grad():
        attend(*[x.float() for x in inputs])
    assert len(calls) == 1 + (not plain), "without gradients the scores are never kept"


def windowed_by_definition(attention, tokens, xy, other, other_xy, rgb):
    """softmax(q.k / sqrt(e) - |x - y|^2 / 2 s^2) over a full matrix, in float64: the output, the
    colours, and how large both were if no terms cancelled."""
    split = lambda z: z.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # noqa: E731
    joined = lambda z: z.transpose(1, 2).flatten(2)  # noqa: E731
    attention, loud = attention.double(), copy.deepcopy(attention).double()
    for name, p in loud.named_parameters():
        p.data = p.data if name == "log_width" else p.data.abs()
    precision = torch.exp(-2 * attention.log_width)[:, None, None]

    def projected(block, tokens, other):
        key, value = block.key_value(other).chunk(2, -1)
        query, key = split(block.query(tokens)), split(key)
        return query @ key.mT / math.sqrt(query.shape[-1]), split(value)

    logits, value = projected(attention, tokens, other)
    far = (xy[:, None, :, None] - other_xy[:, None, None]).square().sum(-1)
    weights = (logits - far * precision / 2).softmax(-1)
    colours = joined(weights @ rgb[:, None])
    out = attention.out(joined(weights @ value)) + attention.colours(colours)
    # The terms of a score: q k, and x.y and |y|^2 / 2 over s^2. Both x and y are centred.
    terms, loud_value = projected(loud, tokens.abs(), other.abs())
    x, y = (xy - 0.5).abs()[:, None], (other_xy - 0.5).abs()[:, None]
    terms = terms + precision * (x @ y.mT + 0.5 * y.square().sum(-1)[..., None, :])
    weights = weights * (1 + terms.amax(-1, keepdim=True))
    loud_colours = joined(weights @ rgb[:, None].abs())
    loud_out = loud.out(joined(weights @ loud_value)) + loud.colours(loud_colours)
    return (out, colours), (loud_out, loud_colours)


@pytest.mark.parametrize("training", [True, False])
def test_windows_equal_their_definition_with_a_full_matrix(training):
    torch.manual_seed(0)
    attention = Attention(32, 4, windows=True)
    tokens, other = torch.randn(2, 7, 32), torch.randn(2, 11, 32)
    xy, other_xy, rgb = torch.rand(2, 7, 2), torch.rand(2, 11, 2), torch.randn(2, 11, 3)
    with torch.set_grad_enabled(training):
        got = attention(tokens, xy, attention.kv(other, other_xy, rgb))
    doubles = [z.double() for z in (tokens, xy, other, other_xy, rgb)]
    (want, _), (size, _) = windowed_by_definition(attention, *doubles)
    assert_near([got], [want], [size])


def test_a_narrow_window_reads_the_nearest_colour():
    torch.manual_seed(1)
    attention = Attention(16, 2, windows=True)
    with torch.no_grad():
        attention.log_width.fill_(math.log(0.003))
    side = torch.arange(7) / 7
    other_xy, rgb = torch.cartesian_prod(side, side)[None], torch.randn(1, 49, 3)
    kv = attention.kv(torch.randn(1, 49, 16), other_xy, rgb)
    _, colours = attention.read(torch.randn(1, 49, 16), other_xy, kv)
    torch.testing.assert_close(colours.unflatten(-1, (2, 3))[:, :, 0], rgb, rtol=1e-6, atol=0)


def test_windows_keep_their_place_under_bf16_autocast():
    torch.manual_seed(2)
    attention = Attention(32, 4, windows=True)
    xy, other_xy, rgb = torch.rand(1, 64, 2), torch.rand(1, 99, 2), torch.randn(1, 99, 3)
    tokens, other = torch.zeros(1, 64, 32), torch.zeros(1, 99, 32)  # windows alone decide
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = attention.read(tokens, xy, attention.kv(other, other_xy, rgb))
    doubles = [z.double() for z in (tokens, xy, other, other_xy, rgb)]
    (_, exact), (_, size) = windowed_by_definition(attention, *doubles)
    assert_near([rounded], [exact], [size])
