"""`--what scale`: its arithmetic by hand, and what it measures."""

import re
from dataclasses import replace

import numpy as np
import pytest
from small import staged

import jobs.benchmark as job
from mambaflow.benchmarks import scale
from mambaflow.benchmarks.bench import BenchmarkConfig
from mambaflow.benchmarks.scale import Rates, Scale, reading, work
from mambaflow.config import RECIPES
from mambaflow.data.batches import RowOrder
from mambaflow.storage import at

RATES = Rates(
    rows=48_000, shards=24, data_bytes=480_000_000, resident=True, batch=16, step_s=0.5,
    read_s=1e-8, checkpoint_bytes=106_000_000, checkpoint_s=2.0, gradient_bytes=26_400_000,
)  # fmt: skip


def on(gpus: int, rates: Rates = RATES) -> Scale:
    return Scale(rates=rates, gpus=gpus, gpus_per_node=8, eval_every=1000, trials=24, epochs=50)


def test_steps_and_epochs_by_hand():
    eight, many = on(8), on(1024)
    assert (eight.nodes, many.nodes, on(65).nodes, on(1).nodes) == (1, 128, 9, 1)
    assert (eight.step_images, many.step_images) == (128, 16_384)
    assert (eight.samples_per_s, many.samples_per_s) == (256, 32_768)
    assert (eight.epoch_steps, eight.epoch_s) == (375, 187.5)
    assert many.epoch_steps == pytest.approx(2.929_687_5)
    assert many.epoch_s == pytest.approx(1.464_843_75)


def test_what_is_read_by_hand():
    # All 24 shards, 480 MB, by each node: 60 MB for each of its 8 GPUs, in 187.5 s, and in 23.4375.
    assert on(8).node_shards == 24 and on(8).node_bytes == 480e6
    assert on(8).gpu_bytes_per_s == 320_000 and on(8).all_bytes_per_s == 2_560_000
    assert on(64).gpu_bytes_per_s == 2_560_000 and on(64).all_bytes_per_s == 163_840_000
    # Two GPUs are no whole node: its reading is shared by two.
    assert on(2).gpu_bytes_per_s == 480e6 / 2 / 750
    assert scale.used(RATES) == 10_000 * 32


def test_gradients_and_checkpoints_by_hand():
    # 2 x 7/8 of 26.4 MB, in half a second; one GPU has nobody to send to.
    assert on(8).all_reduce_bytes == 46_200_000 and on(1).all_reduce_bytes == 0
    assert on(8).network_bits_per_s == 739_200_000
    assert on(1024).all_reduce_bytes == pytest.approx(52_748_437.5)
    # A checkpoint in 500 s, and 2 s to write it.
    assert on(8).checkpoint_bytes_per_hour == on(1024).checkpoint_bytes_per_hour == 763_200_000
    assert on(8).checkpoint_share == 2 / 502


def test_a_sweep_by_hand():
    # A trial is 50 x 48,000 images at 32 a second: 75,000 s. On 8 GPUs 24 are three rounds.
    assert on(8).trial_hours == pytest.approx(75_000 / 3600)
    assert on(8).sweep_gpu_hours == on(1024).sweep_gpu_hours == pytest.approx(500)
    assert on(8).sweep_hours == pytest.approx(62.5)
    assert on(64).sweep_hours == pytest.approx(75_000 / 3600)


def test_a_node_reads_the_shards_that_have_a_row_of_its_share():
    shards, rows_per_shard, nodes = 20, 8, 16
    rows = shards * rows_per_shard
    order, share = RowOrder(rows, seed=0), rows // nodes
    # In a step of a whole epoch a node's share are samples in a row, as in Batches.
    read = [
        len(np.unique(order.stretch(first, share) // rows_per_shard))
        for first in range(0, 200 * rows, share)
    ]
    rates = replace(RATES, rows=rows, shards=shards, resident=False)
    told = replace(on(nodes, rates), gpus_per_node=1).node_shards
    assert 0 < told < share and told == pytest.approx(np.mean(read), rel=0.03)


def test_tables_say_where_shards_or_images_are_fewer_than_what_shares_them():
    assert "fewer shards" not in reading([on(8)]).caption
    assert (
        "With 64, 1024 GPUs there are fewer shards (24) than"
        in reading([on(8), on(64), on(1024)]).caption
    )
    few = replace(RATES, rows=2000)
    assert "more images than there are" not in work([on(8, few)]).caption
    assert "With 1024 GPUs a step has more images" in work([on(8, few), on(1024, few)]).caption


def numbers(printed: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell."""
    found: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if line.startswith("| "):
            first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(first, []).extend(rest)
    return found


def test_the_table_is_made_from_what_was_measured_here(tmp_path, capsys, monkeypatch):
    data = staged(tmp_path / "data", rows_per_shard=8)
    made = []
    rates_of = scale.rates_of
    monkeypatch.setattr(scale, "rates_of", lambda *a: made.append(rates_of(*a)) or made[-1])
    flags = ["--what=scale", f"--data={data}", "--batch-size=2", "--queries=4", "--repeats=1"]
    assert job.main([*flags, f"--storage={tmp_path / 'runs'}", "--gpus", "8", "64"]) == 0
    printed = capsys.readouterr().out
    (rates,) = made
    files = list((data / "train").glob("*.parquet"))
    assert rates.shards == len(files) == 5 and rates.rows == 40 and not rates.resident
    assert rates.data_bytes == sum(f.stat().st_size for f in files)
    assert rates.step_s > 0 and rates.read_s > 0 and rates.checkpoint_s > 0
    # V2 at full size: weights of four bytes; as many again of the average and of two moments.
    assert rates.gradient_bytes == 4 * 6_616_170
    assert rates.checkpoint_bytes == pytest.approx(4 * rates.gradient_bytes, rel=0.01)
    assert not at(tmp_path / "runs").list(), "the checkpoint is removed"
    found = numbers(printed)
    every = RECIPES["mission"]("v2").train.eval_every
    for gpus in (8, 64):
        told = replace(on(gpus, rates), eval_every=every)
        for value in (told.samples_per_s, told.all_bytes_per_s / 1e6, told.sweep_gpu_hours):
            assert scale.said(value) in found[str(gpus)]
    assert "NOT measured: the network" in printed and f"data {data}" in printed.splitlines()[-1]
    assert re.search(r"With 8, 64 GPUs there are fewer shards \(5\)", printed)


@pytest.mark.s3
def test_a_checkpoint_is_measured_where_runs_are_kept_and_is_removed(bucket):
    config = BenchmarkConfig(what="scale", storage=f"{bucket}/runs")
    with scale.checkpoint_folder(config) as folder:
        assert folder.uri.startswith(f"{bucket}/runs/benchmark-")
        folder.write("step_0000001/model.safetensors", b"x")
    assert at(f"{bucket}/runs").list() == []


@pytest.mark.parametrize(
    "name, value",
    [("gpus", (8, 0)), ("gpus", ()), ("gpus_per_node", 0), ("trials", 0), ("epochs", 0)],
)
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \(=.*\) must be positive"):
        BenchmarkConfig(what="scale", **{name: value})
