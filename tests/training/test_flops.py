"""FLOPs of a step are those of its products, at any size and whatever kernels are built."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import small
import torch

from mambaflow.config import ARCHITECTURES, ModelConfig, TrainConfig
from mambaflow.data.batches import Batches, Layout
from mambaflow.data.shard_reader import ShardSet
from mambaflow.models.velocity_field import VelocityField
from mambaflow.training.flops import counted, image_flops, step_flops
from mambaflow.training.objective import Objective

V1 = replace(ARCHITECTURES["v1"], d_model=16, num_layers=2, num_heads=2, frequencies=4)
# Each differs from `small.MODEL` or V1 in what its products are.
MODELS = {
    "v2": small.MODEL,
    "v1": V1,
    "joint, perceiver": replace(V1, scan="joint", readout="perceiver", perceiver_iterations=3),
    "append, adaln": replace(V1, modulation="adaln", readout="perceiver", windows=True),
    "cross-attention": replace(small.MODEL, readout="cross_attention", modulation="add"),
    "gaussian": replace(small.MODEL, start="gaussian", residual=False),
    "plain": replace(small.MODEL, start="plain", local_linear=False, query_attention=False),
    "one of each": replace(
        small.MODEL, d_state=1, d_conv=1, expand=1, num_heads=1, frequencies=1, mlp_ratio=1
    ),
    "beyond the kernels": replace(small.MODEL, d_state=65, d_conv=9, bidirectional=False),
}


# V1's products, and V2's in their smallest sizes; the others take a minute.
IN_SHORT = ("v1", "one of each")


def objective(model: ModelConfig) -> Objective:
    return Objective(VelocityField(model), TrainConfig())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n not in IN_SHORT else ()) for n in MODELS]
)
def test_six_small_counts_give_the_count_of_any_size(name):
    found, whole = image_flops(MODELS[name]), objective(MODELS[name])
    # 70 tokens are beyond a chunk of the scan.
    for known, queries in ((1, 1), (2, 9), (17, 4), (70, 3), (6, 70)):
        assert found(known, queries) == counted(whole, known, queries)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_flops_are_proportional_to_the_batch(name):
    whole = objective(MODELS[name])
    assert counted(whole, 5, 7, images=3) == 3 * counted(whole, 5, 7)
    few, many = (TrainConfig(batch_size=b) for b in (2, 10))
    assert step_flops(MODELS[name], many, 5, 7) == 5 * step_flops(MODELS[name], few, 5, 7)


def test_a_v1_of_one_layer_is_counted_by_hand():
    model = replace(V1, num_layers=1, d_state=5, d_conv=3, expand=3, mlp_ratio=3)
    k, n, d, inner, rank = 7, 4, 16, 48, 1  # rank: a sixteenth of the width
    features, tokens = 2 * model.frequencies + 2, k + n
    # Products of the forward pass as (multiplications, gradients that they have): of the weight
    # always, of what it is multiplied with unless that is an input.
    products = [
        (k * (features + 3) * d, 1),  # known pixels
        (n * features * d, 1),  # queries
        (n * 3 * d, 1),  # their noisy colours
        ((k + n) * 2 * model.frequencies, 0),  # phases of two coordinates by fixed waves
        (d * d, 1),  # time: its sinusoids have no gradient,
        (d * d, 2),  # and then a second layer
        (tokens * d * 2 * inner, 2),  # into the block
        (tokens * inner * (rank + 2 * model.d_state), 2),
        (tokens * rank * inner, 2),
        (tokens * inner * d, 2),  # and out of it
        (n * d * d, 2),  # query
        (k * d * 2 * d, 2),  # key and value
        (2 * n * k * d, 2),  # attention: scores, and their sum over values
        (n * d * d, 2),  # its output
        (2 * n * d * model.mlp_ratio * d, 2),
        (n * d * 3, 2),  # head
    ]
    by_hand = sum(2 * size * (1 + gradients) for size, gradients in products)
    assert image_flops(model)(k, n) == by_hand
    assert step_flops(model, TrainConfig(batch_size=6), k, n) == 6 * by_hand


@pytest.mark.parametrize(
    ("least", "most", "numbers"), [(3, 9, range(3, 10)), (0, 5, [5]), (0, 0, [11])]
)
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_the_mean_is_over_the_numbers_of_queries_that_a_run_draws(name, least, most, numbers):
    train, whole = TrainConfig(min_queries=least, max_queries=most), objective(MODELS[name])
    expected = mean(train.batch_size * counted(whole, 4, n) for n in numbers)
    assert step_flops(MODELS[name], train, 4, 11) == int(expected)


def test_the_numbers_of_queries_are_those_that_batches_draw(tmp_path):
    shards = ShardSet(str(small.staged(tmp_path)), "train")
    layout = Layout.of(shards.spec, small.MODEL)
    found = image_flops(small.MODEL)
    for least, most in ((3, 6), (0, 6), (0, 0)):
        train = TrainConfig(batch_size=1, min_queries=least, max_queries=most)
        batches = Batches(shards, layout, train)
        drawn = {batches.queries(step) for step in range(200)}
        expected = int(mean(found(layout.known, n) for n in drawn))
        assert step_flops(small.MODEL, train, layout.known, layout.target) == expected


def test_precision_and_schedule_change_nothing():
    base = TrainConfig()
    other = replace(base, precision="bf16", weighting="velocity", share_at_zero=0.5, seed=9, lr=1.0)
    assert step_flops(small.MODEL, base, 5, 6) == step_flops(small.MODEL, other, 5, 6)


# Of the compiled kernels, counted operator by operator as they ran: a step of 16 images at full
# size, with 204 known pixels and 204 queries, without the drawing of noise.
FULL = {"v1": 16 * 28_767_913_984, "v2": 16 * 7_743_698_080}


@pytest.mark.slow
@pytest.mark.parametrize("arch", FULL)
def test_full_size_is_what_is_known_of_it(arch):
    assert step_flops(ARCHITECTURES[arch], TrainConfig(batch_size=16), 204, 204) == FULL[arch]


TESTS = Path(small.__file__).parent
TOLD = """
import small
from mambaflow.training.flops import image_flops
print(image_flops(small.MODEL)(28, 28))
"""


def test_flops_do_not_depend_on_the_compiled_kernels():
    env = {**os.environ, "MAMBAFLOW_NATIVE": "0", "MAMBAFLOW_ONEDNN": "0"}
    command = [sys.executable, "-c", TOLD]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=TESTS)
    assert int(done.stdout) == image_flops(small.MODEL)(28, 28)


def test_counting_leaves_the_generator_alone():
    before = torch.get_rng_state()
    image_flops(small.MODEL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("known", "target"), [(0, 3), (3, 0)])
def test_no_pixels_are_refused_by_name(known, target):
    name = "known" if known == 0 else "queries"
    with pytest.raises(ValueError, match=rf"{name} \(=0\) must be positive; use 1 or more"):
        step_flops(small.MODEL, TrainConfig(), known, target)
