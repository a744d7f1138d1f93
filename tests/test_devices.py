"""What a GPU is given lies on it: shown without one, by tensors that are a shape and a device.

torch refuses an operation between two devices among them as it would among real ones. They hold no
numbers; whether those are right only a GPU shows: test_gpu.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mambaflow.benchmarks.bench import Fixed
from mambaflow.benchmarks.sample import solvers
from mambaflow.config import ARCHITECTURES, TrainConfig
from mambaflow.data.batches import Batches, Layout, PixelBatch, _places
from mambaflow.data.device_rows import DeviceRows
from mambaflow.kernels import random_cpu
from mambaflow.models import selective_scan
from mambaflow.training.loop import TrainState, fit

GPU = torch.device("cuda", 0)
SMALL = {"d_model": 64, "num_layers": 2, "num_heads": 4}


class Shapes(FakeTensorMode):
    """Where tensors hold nothing; a copy of one is in the same place."""

    def __deepcopy__(self, memo: dict) -> "Shapes":
        return self


def columns(xy: torch.Tensor, return_inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a grid of 32."""
    return xy.new_empty(32), torch.empty_like(xy, dtype=torch.int64)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that has a GPU, and tensors that hold nothing."""
    pytest.importorskip("triton")
    monkeypatch.setattr(
        random_cpu, "is_supported", lambda given: False
    )  # it would read the numbers
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(selective_scan, "_on_gpu", lambda: "triton")
    # How many columns and rows there are hangs on the numbers.
    monkeypatch.setattr(torch.Tensor, "unique", columns)
    _places.cache_clear()
    with Shapes():
        yield
    _places.cache_clear()


def state(arch: str, train: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainState:
    with monkeypatch.context() as patch, GPU:  # a tensor without numbers cannot be moved in place
        patch.setattr(nn.Module, "to", lambda self, device: self)
        return TrainState(replace(ARCHITECTURES[arch], **SMALL), train, GPU)


def batch() -> PixelBatch:
    xy, rgb = (torch.rand(8, 60, c) for c in (2, 3))
    return PixelBatch(xy[:, :30], rgb[:, :30], xy[:, 30:], rgb[:, 30:], torch.arange(8))


def empty_gradients(trained: TrainState, loss: torch.Tensor) -> None:
    """In place of a backward pass, which would wake the GPU that is not there."""
    assert loss.requires_grad and loss.device == GPU
    for p in trained.model.parameters():
        p.grad = torch.empty_like(p)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_training_step_stays_on_the_gpu(arch, gpu, monkeypatch):
    train = TrainConfig(batch_size=8, share_at_zero=0.25)
    trained = state(arch, train, monkeypatch)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: empty_gradients(trained, self))
    for step in fit(trained, Fixed(batch()), train, 2):
        assert step.loss.device == step.grad_norm.device == GPU
    assert all(p.device == GPU for p in trained.ema.parameters())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("lost", ["time.rates", "head.weight"])
def test_what_was_left_on_the_cpu_would_be_found(arch, lost, gpu, monkeypatch):
    train = TrainConfig(batch_size=8)
    trained = state(arch, train, monkeypatch)
    room, _, name = lost.rpartition(".")
    module = trained.model.get_submodule(room)
    there = getattr(module, name)
    here = torch.empty(there.shape)
    setattr(module, name, nn.Parameter(here) if isinstance(there, nn.Parameter) else here)
    with pytest.raises(RuntimeError, match="device"):
        next(fit(trained, Fixed(batch()), train, 2))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_sampler_stays_on_the_gpu(arch, gpu, monkeypatch):
    # What a sampler reads of numbers: its times, and the size of its noise.
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [0.0, 0.5, 1.0])
    monkeypatch.setattr(FakeTensor, "__float__", lambda self: 0.0)
    model = state(arch, TrainConfig(), monkeypatch).ema
    given = batch().to(GPU)
    field = model.condition(given)
    # Without gradients it looks at the times.
    field = replace(field, velocity=torch.enable_grad()(field.velocity))
    for solve in solvers(2).values():
        assert solve(field).device == GPU


class Held:
    """Rows that are all on the GPU: no reader is asked."""

    shuffle_block = 24

    def __len__(self) -> int:
        return 24

    def rows(self, row_numbers: np.ndarray) -> None:
        raise AssertionError("the rows are on the GPU")

    expect = rows


@pytest.mark.parametrize("masks", ["strict", "fresh"])
def test_resident_rows_make_batches_on_the_gpu(masks, gpu, monkeypatch):
    rows = DeviceRows(
        torch.arange(24),
        torch.zeros(24, 408, dtype=torch.int32, device=GPU),
        torch.zeros(24, 408, 3, dtype=torch.uint8, device=GPU),
        torch.zeros(24, 1024, 3, dtype=torch.uint8, device=GPU) if masks == "fresh" else None,
    )
    train = TrainConfig(batch_size=8, masks=masks)
    batches = Batches(Held(), Layout(32, 204, 204), train, device_rows=rows)
    monkeypatch.setattr(batches.order, "stretch", lambda first, count: np.arange(count))
    drawn = torch.zeros(8, 408, dtype=torch.int64)
    monkeypatch.setattr("mambaflow.data.batches.choose", lambda *given, draw: drawn)
    made = batches[0]
    assert made.query_rgb.device == made.known_xy.device == GPU and made.number.device.type == "cpu"
