"""Features, times and modulation against their definitions."""

import math

import pytest
import torch

from mambaflow.models.layers import FourierFeatures, Modulation, TimeEmbedding


def test_no_feature_is_faster_than_the_band_limit():
    features = FourierFeatures(64, 16.0)
    cycles = features.waves.norm(dim=0) / (2 * math.pi)
    assert cycles.max().item() == pytest.approx(16.0, rel=1e-6)
    assert cycles.min().item() == pytest.approx(0.5, rel=1e-6)
    out = features(torch.rand(2, 5, 2))
    assert out.shape == (2, 5, features.width) and out.abs().max() <= 1


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
