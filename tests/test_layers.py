"""Features, attention and its windows against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from mambaflow import layers
from mambaflow.layers import Attention, FourierFeatures, Modulation, TimeEmbedding, attend


def test_no_feature_is_faster_than_the_band_limit():
    features = FourierFeatures(64, 16.0)
    cycles = features.waves.norm(dim=0) / (2 * math.pi)
    assert cycles.max().item() == pytest.approx(16.0, rel=1e-6)
    assert cycles.min().item() == pytest.approx(0.5, rel=1e-6)
    out = features(torch.rand(2, 5, 2))
    assert out.shape == (2, 5, features.width) and out.abs().max() <= 1


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
        got = attention(tokens, xy, attention.keys(other, other_xy, rgb))
    doubles = [z.double() for z in (tokens, xy, other, other_xy, rgb)]
    want = windowed_by_definition(attention.double(), *doubles)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "k", "plain"), [(204, 204, True), (300, 430, True), (400, 400, False)]
)
def test_few_tokens_in_training_attend_as_the_fused_attention_does(n, k, plain, monkeypatch):
    monkeypatch.setattr(layers, "PLAIN", 2 * 3 * 300 * 430)
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


def test_a_narrow_window_reads_the_nearest_colour():
    torch.manual_seed(1)
    attention = Attention(16, 2, windows=True)
    with torch.no_grad():
        attention.log_width.fill_(math.log(0.003))
    side = torch.arange(7) / 7
    other_xy, rgb = torch.cartesian_prod(side, side)[None], torch.randn(1, 49, 3)
    keys = attention.keys(torch.randn(1, 49, 16), other_xy, rgb)
    _, colours = attention.read(torch.randn(1, 49, 16), other_xy, keys)
    torch.testing.assert_close(colours.unflatten(-1, (2, 3))[:, :, 0], rgb, atol=1e-3, rtol=1e-3)


def test_windows_keep_their_place_under_bf16_autocast():
    torch.manual_seed(2)
    attention = Attention(32, 4, windows=True)
    xy, other_xy, rgb = torch.rand(1, 64, 2), torch.rand(1, 99, 2), torch.randn(1, 99, 3)
    tokens, other = torch.zeros(1, 64, 32), torch.zeros(1, 99, 32)  # windows alone decide
    exact = attention.read(tokens, xy, attention.keys(other, other_xy, rgb))[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention.read(tokens, xy, attention.keys(other, other_xy, rgb))[1]
    torch.testing.assert_close(rounded, exact, atol=2e-3, rtol=0)


def test_times_are_told_apart():
    torch.manual_seed(3)
    t = torch.linspace(0, 1, 101)
    far = torch.cdist(TimeEmbedding(64, 1000.0)(t), TimeEmbedding(64, 1000.0)(t) * 0)
    assert far.std() > 0
    embedded = TimeEmbedding(64, 1000.0)(t)
    gaps = torch.pdist(embedded)
    assert gaps.min() > 1e-3


def test_modulation_starts_as_an_open_gate_for_every_time():
    out = Modulation(8, 3, 2)(torch.randn(5, 8))
    assert out.shape == (2, 3, 3, 5, 1, 8)
    assert (out[:, :, :2] == 0).all() and (out[:, :, 2] == 1).all()
