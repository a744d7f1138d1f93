"""What a GPU computes is what the CPU computes. Skipped where torch sees none."""

from dataclasses import fields, replace

import numpy as np
import pytest
import small
import torch

from mambaflow import ssm
from mambaflow.batches import Batches
from mambaflow.columns import resident
from mambaflow.config import ARCHITECTURES, ScaleConfig, TrainConfig
from mambaflow.run import open_run, train
from mambaflow.shard_set import ShardSet
from mambaflow.storage import at
from mambaflow.training import TrainState, compiled, fit, loss
from mambaflow.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def near(one: torch.Tensor, other: torch.Tensor, most: float) -> None:
    """The length of the difference over that of the second, at most `most`."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    assert (one - other).norm() <= most * other.norm()


def backends() -> list[str]:
    return ["cuda", "triton"] if ssm._has_mamba_ssm() else ["triton"]


@pytest.mark.parametrize(("kind", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("n", [1, 33, 408])
def test_the_kernels_agree_with_the_cpu_forward_and_backward(kind, most, n):
    torch.manual_seed(0)
    b, d, s = 4, 512, 16
    shapes = [(b, n, d), (b, n, d), (d, s), (b, n, s), (b, n, s), (d,), (b, n, d)]
    given = [torch.randn(shape) for shape in shapes]
    given[1] -= 3
    given[2] = -given[2].exp()
    given = [x.to(kind) if x.dim() == 3 else x for x in given]
    slope = torch.randn(b, n, d).to(kind)

    def results(device: torch.device, backend: str) -> list[torch.Tensor]:
        tensors = [x.to(device).requires_grad_() for x in given]
        y = ssm.selective_scan(*tensors, backend=backend)
        return [y, *torch.autograd.grad(y, tensors, slope.to(device))]

    right = results(CPU, "auto")
    for backend in backends():
        for found, want in zip(results(GPU, backend), right, strict=True):
            near(found, want, most)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_on_the_gpu_has_the_loss_and_gradients_of_the_cpu(arch, tmp_path):
    shards = ShardSet(str(small.staged(tmp_path)), "train")
    model = replace(ARCHITECTURES[arch], d_model=64, num_layers=2)
    config = TrainConfig(batch_size=8, share_at_zero=0.25)
    found = []
    for device in (CPU, GPU):
        state = TrainState(model, config, device)
        batch = Batches(shards, small.LAYOUT, config)[0].to(device)
        value = loss(state.model, batch, config)
        value.backward()
        grads = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
        found.append((value, torch.cat(grads)))
    for one, other in zip(*found[::-1], strict=True):
        near(one, other, 1e-3)


@pytest.mark.parametrize("masks", ["strict", "fresh"])
def test_rows_on_the_gpu_give_the_batches_and_noise_of_the_cpu(masks, tmp_path):
    shards = ShardSet(str(small.staged(tmp_path)), "train")
    config = TrainConfig(batch_size=8, masks=masks)
    held = resident(shards, GPU)
    assert held is not None and held.rgb.is_cuda
    near_one, plain = (Batches(shards, small.LAYOUT, config, 0, 1, rows) for rows in (held, None))
    for step in (0, 4, 5):
        one, other = near_one[step], plain[step]
        assert one.query_rgb.is_cuda
        for f in fields(one):
            torch.testing.assert_close(getattr(one, f.name).cpu(), getattr(other, f.name))
        assert torch.equal(one.noise(3).cpu(), other.noise(3))


@pytest.mark.parametrize("how", ["on", "graphs"])
def test_compiled_steps_learn_what_plain_ones_learn(how, tmp_path):
    shards = ShardSet(str(small.staged(tmp_path)), "train")
    losses = []
    for way in ("off", how):
        state = TrainState(small.MODEL, small.FIT, GPU)
        batches = Batches(shards, small.LAYOUT, small.FIT, 0, 1, resident(shards, GPU))
        forward = compiled(state.model, way)
        steps = fit(state, batches, small.FIT, 20, forward)
        losses.append([progress.loss.item() for progress in steps])
    assert np.allclose(*losses, rtol=1e-2)


def test_a_run_trains_scores_and_resumes_on_the_gpu(tmp_path):
    config = small.run_config(small.staged(tmp_path), tmp_path / "runs", "gpu")
    config = replace(config, scale=ScaleConfig(ray=False, use_gpu=True))
    open_run(config)
    assert train(config, World(0, 1, GPU)).status == "finished"
    assert at(tmp_path / "runs").child("gpu").exists("report/results.json")
