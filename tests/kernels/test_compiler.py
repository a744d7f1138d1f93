"""Marks for torch.compile are those of its own decorators, and cost no import of TorchDynamo."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from mambaflow.kernels.compiler import constant, opaque

ROOT = Path(__file__).parents[2]


def test_a_constant_is_marked_as_torch_marks_it():
    def ours() -> None: ...
    def theirs() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant(ours)) == vars(theirs) and vars(theirs)


def test_what_is_opaque_and_used_runs_as_it_is():
    def named(x: torch.Tensor) -> torch.Tensor:
        assert not torch.compiler.is_dynamo_compiling()
        return x + 1

    compiled = torch.compile(opaque(named, used=True), backend="eager")
    assert compiled(torch.ones(())) == 2
    assert opaque(named, used=False) is named


def test_no_job_loads_torch_dynamo_to_begin_with():
    code = (
        "import sys\n"
        "import train, evaluate, stage, sweep\n"
        "import mambaflow.distributed.environment as e; e.set_ray_environment()\n"
        "import mambaflow.distributed.train, mambaflow.distributed.evaluate\n"
        "print([m for m in sys.modules if m.startswith('torch._dynamo')])"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "jobs", "tune"))
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert said.stdout.strip() == "[]"
