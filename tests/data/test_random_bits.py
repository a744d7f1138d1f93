"""Philox against its published vectors, and its numbers against the laws that they promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mambaflow.data.random_bits import _bits, _philox, bits, drawn, normal, philox, uniform
from mambaflow.kernels import random_cpu
from mambaflow.kernels.build import library

# Random123, kat_vectors: philox4x32, 10 rounds.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip

WORD = st.integers(0, 2**32 - 1)


def integers(text):
    return [int(word, 16) for word in text.split()]


WAYS = [philox, _philox]  # compiled, where there is a compiler; and by torch


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_vectors(counter, key, expected, way):
    assert way(torch.tensor(integers(counter)), tuple(integers(key))).tolist() == integers(expected)


def by_hand(counter, key):
    """Section 4.3 of the paper in unbounded integers."""
    (a, b, c, d), (k0, k1), low = counter, key, 2**32
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right // low) ^ b ^ k0, right % low, (left // low) ^ d ^ k1, left % low
        k0, k1 = (k0 + 0x9E3779B9) % low, (k1 + 0xBB67AE85) % low
    return [a, b, c, d]


COUNTER = st.lists(WORD, min_size=4, max_size=4)


@pytest.mark.parametrize("way", WAYS)
@given(counters=st.lists(COUNTER, min_size=1, max_size=70), key=st.tuples(WORD, WORD))
@settings(max_examples=50)
def test_philox_equals_arithmetic_without_overflow(counters, key, way):
    assert way(torch.tensor(counters), key).tolist() == [by_hand(c, key) for c in counters]


@given(
    items=st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=8),
    count=st.integers(1, 9),
    seed=WORD,
)
@settings(max_examples=40)
def test_words_depend_on_their_own_item_alone(items, count, seed):
    together = bits(seed, "noise", 3, torch.tensor(items), count)
    alone = [bits(seed, "noise", 3, torch.tensor([item]), count)[0] for item in items]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(bits(seed, "noise", 3, torch.tensor(items), count + 5)[:, :count], together)


@pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")
@given(
    items=st.lists(st.integers(-(2**62), 2**62 - 1), max_size=40),
    count=st.sampled_from([1, 2, 4, 5, 127, 128, 129, 1024]),
    seed=WORD,
    purpose=st.text(max_size=8),
    stream=WORD,
)
@settings(max_examples=60)
def test_compiled_words_are_those_of_torch(items, count, seed, purpose, stream):
    item = torch.tensor(items, dtype=torch.int64)
    assert random_cpu.is_supported(item)
    compiled = random_cpu.bits(seed, purpose, stream, item, count)
    assert torch.equal(compiled, _bits(seed, purpose, stream, item, count))


def test_another_seed_purpose_stream_or_item_gives_other_words():
    ways = [
        (0, "noise", 0, 5), (1, "noise", 0, 5), (0, "time", 0, 5), (0, "noise", 1, 5),
        (0, "noise", 0, 6), (0, "noise", 0, 5 + 2**32), (0, "noise", 0, 5 + 2**40),
    ]  # fmt: skip
    drawn = {
        tuple(bits(seed, purpose, stream, torch.tensor([item]), 4)[0].tolist())
        for seed, purpose, stream, item in ways
    }
    assert len(drawn) == len(ways)


@pytest.mark.parametrize("name", ["seed", "stream"])
@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_seed_or_stream_beyond_32_bits_is_refused_by_name(name, value):
    arguments = {"seed": 0, "stream": 0} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} \(={value}\) must be in \[0, 2\^32\)"):
        bits(arguments["seed"], "noise", arguments["stream"], torch.tensor([0]), 1)


def test_uniform_stays_inside_the_interval_at_the_smallest_and_largest_word(monkeypatch):
    ends = torch.tensor([[0, 2**32 - 1]])
    monkeypatch.setattr("mambaflow.data.random_bits.bits", lambda *_: ends)
    assert uniform(0, "law", 0, torch.tensor([0]), 2).tolist() == [[2.0**-24, 1 - 2.0**-24]]
    assert normal(0, "law", 0, torch.tensor([0]), 2).isfinite().all()


def test_uniform_is_uniform_on_the_open_interval():
    drawn = uniform(1, "law", 0, torch.arange(50_000), 4).double().flatten().numpy()
    assert 0 < drawn.min() and drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    # Neighbouring words of an item, and of neighbouring items, know nothing of one another.
    for one, other in ((drawn[:-1], drawn[1:]), (drawn[:-4], drawn[4:])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(len(one))


def test_normal_is_standard_normal():
    drawn = normal(1, "law", 0, torch.arange(50_000), 4).double().flatten().numpy()
    n = len(drawn)
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(drawn)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / n)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    # The two of a Box-Muller pair share a radius; they must be independent even so.
    assert abs(np.corrcoef(drawn[::2] ** 2, drawn[1::2] ** 2)[0, 1]) < 4 / math.sqrt(n / 2)


def test_an_odd_count_of_normals_is_a_prefix_of_the_even_one():
    items = torch.arange(5)
    assert torch.equal(normal(0, "n", 0, items, 7), normal(0, "n", 0, items, 8)[:, :7])


def test_a_draw_is_of_all_items_whatever_their_order_and_begins_with_a_smaller_draw():
    items = torch.arange(1000) * 7 + 3
    taken = items[drawn(0, "some", items, 200)].tolist()
    assert len(set(taken)) == 200 and items[drawn(0, "some", items, 100)].tolist() == taken[:100]
    # Of ten classes that lie one after the other, each has its share.
    assert all(5 < sum(c <= i // 700 < c + 1 for i in taken) < 40 for c in range(10))
    mixed = items.flip(0)
    assert mixed[drawn(0, "some", mixed, 200)].tolist() == taken
    assert drawn(0, "some", items, 1000).tolist() == list(range(1000))
    assert items[drawn(1, "some", items, 200)].tolist() != taken
