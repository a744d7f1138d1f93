"""Rows as tensors, on a device or not, give the batches that rows from shards give."""

from dataclasses import fields

import numpy as np
import pytest
import small
import torch
from small_shards import SPEC, opened, published, rows_of

from mambaflow.config import TrainConfig
from mambaflow.data.batches import Batches, Layout
from mambaflow.data.device_rows import SHARE, DeviceRows, device_resident, gather_pixels
from mambaflow.data.shard_reader import ShardSet
from mambaflow.storage import at
from mambaflow.training import run as run_module
from mambaflow.training.preflight import open_run
from mambaflow.training.process_group import ProcessGroup
from mambaflow.training.run import train

LAYOUT = Layout(SPEC.size, SPEC.known, SPEC.target)
GPU = torch.device("cuda")


@pytest.fixture
def shards(tmp_path):
    return ShardSet(str(published(tmp_path / "data")), "train")


def test_columns_are_the_rows(shards):
    rows = rows_of(SPEC, 0, 24)
    columns = DeviceRows.of(rows).take(np.array([5, 23, 5]))
    for got, want in (
        (columns.ids, rows.ids),
        (columns.index, rows.index),
        (columns.rgb.flatten(1), rows.rgb),
        (columns.images.flatten(1), rows.images),
    ):
        assert np.array_equal(got.numpy(), want[[5, 23, 5]])


def test_picked_pixels_are_those_of_each_images_own_index():
    images = torch.randint(0, 256, (5, 36, 3), dtype=torch.uint8)
    index = torch.stack([torch.randperm(36)[:9] for _ in range(5)])
    picked = gather_pixels(images, index)
    assert picked.shape == (5, 9, 3)
    for row in range(5):
        assert torch.equal(picked[row], images[row][index[row]])


@pytest.mark.parametrize("masks", ["strict", "fresh"])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_from_resident_rows_are_those_from_shards(shards, masks, world):
    config = TrainConfig(batch_size=8, masks=masks, min_queries=2, max_queries=7)
    held = DeviceRows.of(shards.rows(np.arange(24)))
    for rank in range(world):
        plain = Batches(shards, LAYOUT, config, rank, world)
        near = Batches(shards, LAYOUT, config, rank, world, held)
        for step in (0, 2, 3, 50):  # 2 and 3 are on either side of an epoch's end
            for f in fields(plain[step]):
                assert torch.equal(getattr(plain[step], f.name), getattr(near[step], f.name))


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize(
    ("device", "free", "held"),
    [
        ("cuda", SHARE, True),  # in multiples of what the rows take
        ("cuda", SHARE - 0.01, False),
        ("cpu", 1000, False),
    ],
)
def test_rows_go_to_a_gpu_that_has_room_for_them(shards, device, free, held, images, monkeypatch):
    sent, rows = [], rows_of(SPEC, 0, 24)
    monkeypatch.setattr(DeviceRows, "to", lambda self, device: sent.append(device) or self)
    room = int(free * (2 * rows.index.nbytes + rows.rgb.nbytes + images * rows.images.nbytes))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (room, room))
    found = device_resident(shards, torch.device(device), images)
    assert (found is not None) == held and sent == [GPU] * held
    if held:
        assert not opened(shards), "not twice in memory"
        assert np.array_equal(found.rgb.flatten(1).numpy(), rows.rgb)
        assert (found.images is not None) == images
    assert np.array_equal(shards.rows(np.arange(24)).rgb, rows.rgb)


def test_rows_that_do_not_fit_in_memory_at_once_stay_in_their_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**40, 2**40))
    row = rows_of(SPEC, 0, 1).nbytes
    shards = ShardSet(str(published(tmp_path)), "train", memory=20 * row)
    assert device_resident(shards, GPU, True) is None and not opened(shards)


@pytest.mark.parametrize("masks", ["strict", "fresh"])
@pytest.mark.slow
def test_a_run_on_resident_rows_learns_the_same_weights(tmp_path, masks, monkeypatch):
    data, found = small.staged(tmp_path), []

    def held(shards, device, images):
        found.append(device)
        return DeviceRows.of(shards.rows(np.arange(len(shards))), images)

    for name in ("shards", "device_resident"):
        if name == "device_resident":
            monkeypatch.setattr(run_module, "device_resident", held)
        config = small.run_config(data, tmp_path / "runs", name, masks=masks)
        open_run(config)
        assert train(config, ProcessGroup(0, 1, small.CPU)).status == "finished"
    assert found == [small.CPU], "the second run had its rows at hand"
    weights = [
        at(tmp_path / "runs").child(name).read(f"step_{small.STEPS:07d}/model.safetensors")
        for name in ("shards", "device_resident")
    ]
    assert weights[0] == weights[1]
