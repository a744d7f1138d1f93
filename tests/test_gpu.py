"""What a GPU computes is what the CPU computes. Skipped where torch sees none."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import small
import torch

from mambaflow.config import ARCHITECTURES, ScaleConfig, TrainConfig
from mambaflow.data.batches import Batches
from mambaflow.data.device_rows import device_resident
from mambaflow.data.shard_reader import ShardSet
from mambaflow.models import selective_scan
from mambaflow.storage import at
from mambaflow.training.loop import TrainState
from mambaflow.training.objective import Objective, loss
from mambaflow.training.preflight import open_run
from mambaflow.training.process_group import ProcessGroup
from mambaflow.training.run import train_and_score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def near(one: torch.Tensor, other: torch.Tensor, most: float) -> None:
    """The length of the difference over that of the second, at most `most`."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    assert (one - other).norm() <= most * other.norm()


def backends() -> list[str]:
    return ["cuda", "triton"] if selective_scan._has_mamba_ssm() else ["triton"]


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
        y = selective_scan.selective_scan(*tensors, backend=backend)
        return [y, *torch.autograd.grad(y, tensors, slope.to(device))]

    right = results(CPU, "auto")
    for backend in backends():
        # mamba-ssm's gradients come from an output that it has rounded to bf16 before the gate.
        loose = 4 if (backend, kind) == ("cuda", torch.bfloat16) else 1
        found = results(GPU, backend)
        near(found[0], right[0], most)
        for slope_found, want in zip(found[1:], right[1:], strict=True):
            near(slope_found, want, loose * most)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_on_the_gpu_has_the_loss_and_gradients_of_the_cpu(arch, tmp_path):
    shards = ShardSet(str(small.staged(tmp_path)), "train")
    model = replace(ARCHITECTURES[arch], d_model=64, num_layers=2)
    config = TrainConfig(batch_size=8, share_at_zero=0.25)
    found = []
    for device in (CPU, GPU):
        state = TrainState(model, config, device)
        batch = Batches(shards, small.LAYOUT, config)[0].to(device)
        value = loss(Objective(state.model, config), batch)
        value.backward()
        grads = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
        found.append((value, torch.cat(grads)))
    for one, other in zip(*found[::-1], strict=True):
        near(one, other, 1e-3)


@pytest.mark.parametrize("masks", ["strict", "fresh"])
def test_rows_on_the_gpu_give_the_batches_and_noise_of_the_cpu(masks, tmp_path):
    shards = ShardSet(str(small.staged(tmp_path)), "train")
    config = TrainConfig(batch_size=8, masks=masks)
    held = device_resident(shards, GPU, images=masks == "fresh")
    assert held is not None and held.rgb.is_cuda
    near_one, plain = (Batches(shards, small.LAYOUT, config, 0, 1, rows) for rows in (held, None))
    for step in (0, 4, 5):
        one, other = near_one[step], plain[step]
        assert one.query_rgb.is_cuda
        for f in fields(one):
            torch.testing.assert_close(getattr(one, f.name).cpu(), getattr(other, f.name))
        assert torch.equal(one.noise(3).cpu(), other.noise(3))


COMPILED = """
import sys
import numpy as np, torch
from dataclasses import replace
from mambaflow.data.batches import PixelBatch
from mambaflow.config import ARCHITECTURES, TrainConfig
from mambaflow.training.loop import TrainState, compiled, fit
from mambaflow.training.objective import Objective

small = dict(d_model=64, num_layers=2, num_heads=4, frequencies=8, mlp_ratio=2)
train = TrainConfig(batch_size=8, lr=1e-3)
generator = torch.Generator().manual_seed(0)
xy, rgb = (torch.rand(8, 60, c, generator=generator) for c in (2, 3))
batch = PixelBatch(xy[:, :30], rgb[:, :30], xy[:, 30:], rgb[:, 30:], torch.arange(8)).to("cuda")

class Same:
    def __getitem__(self, step):
        return batch

losses = []
for how in ("off", sys.argv[1]):
    state = TrainState(replace(ARCHITECTURES["v2"], **small), train, torch.device("cuda", 0))
    forward = compiled(Objective(state.model, train), how)
    losses.append([p.loss.item() for p in fit(state, Same(), train, 12, forward)])
assert np.allclose(*losses, rtol=1e-3), losses
counters = torch._dynamo.utils.counters
assert counters["inductor"]["cudagraph_skips"] == 0, counters
print(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
"""


@pytest.mark.parametrize("how", ["on", "graphs"])
def test_compiled_steps_learn_what_plain_ones_learn(how):
    """In a process of its own: the checks of shapes break graphs."""
    done = subprocess.run([sys.executable, "-c", COMPILED, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    graphs, breaks = map(int, done.stdout.split())
    assert graphs >= 1 and (selective_scan._has_mamba_ssm() or (graphs, breaks) == (1, 0))


def test_a_run_on_the_gpu_ends_and_a_longer_one_resumes_from_it(tmp_path):
    config = small.run_config(small.staged(tmp_path), tmp_path / "runs", "gpu")
    config = replace(config, scale=ScaleConfig(ray=False, use_gpu=True))
    for epochs, resume in ((small.FIT.epochs, False), (small.FIT.epochs + 1, True)):
        longer = replace(config, resume=resume, train=replace(config.train, epochs=epochs))
        open_run(longer)
        outcome = train_and_score(longer, ProcessGroup(0, 1, GPU))
        assert (outcome.status, outcome.step) == ("finished", epochs * small.STEPS // 4)
    assert at(tmp_path / "runs").child("gpu").exists("report/results.json")
