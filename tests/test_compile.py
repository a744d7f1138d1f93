"""The objective is one graph to torch.compile, and compiled it learns the same.

In processes of their own: the checks of shapes, which other tests run under, are none of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

from mambaflow.kernels.build import library

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ONE_GRAPH = """
import sys
from dataclasses import replace
import torch
from mambaflow.kernels import linear
from mambaflow.data.batches import PixelBatch
from mambaflow.config import ARCHITECTURES, TrainConfig
from mambaflow.training.loop import TrainState
from mambaflow.training.objective import Objective

linear.MIN_MULTIPLICATIONS = 0  # where oneDNN makes large products, small ones too
small = dict(d_model=32, num_layers=2, num_heads=4, frequencies=8, mlp_ratio=2)
train = TrainConfig(batch_size=4, share_at_zero=0.25)
state = TrainState(replace(ARCHITECTURES[sys.argv[1]], **small), train, torch.device("cpu"))
torch.manual_seed(0)
for p in state.model.parameters():
    p.data += 0.05 * torch.randn_like(p)  # heads start at zero: gradients must pass them
objective = Objective(state.model, train)
whole = torch.compile(objective, backend="aot_eager", fullgraph=True)
for asked in (30, 20, 25, 27):
    xy, rgb = torch.rand(4, 20 + asked, 2), torch.rand(4, 20 + asked, 3) * 2 - 1
    batch = PixelBatch(xy[:, :20], rgb[:, :20], xy[:, 20:], rgb[:, 20:], torch.arange(4))
    found = []
    for forward in (objective, whole):
        value = forward(batch, *objective.draws(batch))
        value.backward()
        found.append([value, *(p.grad for p in state.model.parameters())])
        state.model.zero_grad()
    (value, *slopes), (other_value, *other_slopes) = found
    torch.testing.assert_close(value, other_value, rtol=1e-5, atol=0)
    # A gradient that cancels, as that of a key's bias, is off by what its neighbours are off by.
    largest = max(p.abs().max() for p in slopes if p is not None)
    for one, other in zip(slopes, other_slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(largest))
    assert sum(p is not None and p.abs().sum() > 0 for p in found[1]) > 30
print(torch._dynamo.utils.counters["stats"]["unique_graphs"], "graphs")
"""


def ran(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, text=True, capture_output=True
    )


@pytest.mark.parametrize("arch", ["v1", "v2"])
def test_either_architecture_is_one_graph_whatever_is_asked(arch):
    done = ran("-c", ONE_GRAPH, arch)
    assert done.returncode == 0, done.stderr[-3000:]
    # One of a size, and one of any size, which torch may find in two steps: first that a size
    # moves, then that a stride moves with it. The last size finds its graph ready.
    graphs, _ = done.stdout.split()
    assert 2 <= int(graphs) <= 3


# Roundings grow from step to step, in the norm of the gradient the fastest.
NEAR = {"step": 0, "train/loss": 1e-3, "train/grad_norm": 1e-2, "val/psnr": 1e-3}


@pytest.mark.skipif(library() is None, reason="no C++ compiler: torch.compile needs one too")
def test_a_compiled_run_ends_where_a_plain_one_does(tmp_path):
    data, found = small.staged(tmp_path), {}
    for how in ("off", "on"):
        place = [f"--data={data}", f"--storage={tmp_path}", f"--run-name={how}"]
        made = tmp_path / f"kernels-{how}"
        done = ran(str(ROOT / "jobs" / "train.py"), *small.FLAGS, *place, f"--compile={how}",
                   TORCHINDUCTOR_CACHE_DIR=str(made))  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert any(made.rglob("*.so")) == (how == "on"), "kernels were compiled where asked for"
        lines = (tmp_path / how / "metrics.jsonl").read_text().splitlines()
        found[how] = [json.loads(line) for line in lines]
    for one, other in zip(found["off"], found["on"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & NEAR.keys():
            assert one[name] == pytest.approx(other[name], rel=NEAR[name]), name
