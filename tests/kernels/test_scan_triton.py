"""The Triton kernel against the reference, in Triton's interpreter: no GPU is needed.

The interpreter is chosen when Triton is imported, so that the comparison runs in a process of its
own, this file as a script.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scans import NAMES, inputs, unchecked, with_gradients, without_cancellation

ROOT = Path(__file__).parents[2]
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="this torch brings no Triton")

# b, n, d, s, gate, strided, dtype, size of A: chunks and blocks are of 32; one token more, one
# fewer, partial
CASES = [
    (1, 1, 1, 1, True, False, "float32", 1.0),
    (2, 31, 5, 3, True, True, "float32", 1.0),
    (1, 32, 32, 16, True, False, "float32", 1.0),
    (2, 33, 33, 4, False, True, "float32", 1.0),
    (1, 65, 40, 16, True, True, "float32", 1.0),
    (1, 34, 11, 64, False, False, "float32", 1.0),
    (2, 33, 20, 8, True, True, "bfloat16", 1.0),
    (1, 33, 5, 3, True, False, "float32", 1e38),  # its exponentials are 0
]


def interpret(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_triton
def test_the_triton_kernel_is_the_reference_forward_and_backward():
    done = interpret()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 * len(CASES) - 2  # output and 7 gradients each, no z in two
    for line in lines:
        case, name, error, most = line.rsplit(" ", 3)
        assert float(error) <= float(most), line


@needs_triton
@pytest.mark.parametrize("states", [16, 64])
def test_the_kernels_compile_for_a_gpu_and_stay_in_its_registers(states, tmp_path):
    code = f"""
import pathlib, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mambaflow.kernels import scan_triton
_, sizes = scan_triton._sizes(512, {states})
options = {{k: sizes.pop(k) for k in ("num_warps", "enable_fp_fusion")}}
for kernel in (scan_triton._forward, scan_triton._backward):
    names = kernel.arg_names
    constants = {{k: v for k, v in dict(sizes, GATED=True, SAVE=True).items() if k in names}}
    scalars = {{k for k in names if k in ("n", "d", "s") or k[-2:] in ("_b", "_n")}}
    kinds = {{k: "i32" if k in scalars else "*fp32" for k in names}}
    source = ASTSource(kernel, {{**kinds, **dict.fromkeys(constants, "constexpr")}}, constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    pathlib.Path("{tmp_path}", kernel.__name__).write_bytes(made.asm["cubin"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reader = Path(importlib.util.find_spec("triton").origin).parent
    reader = reader / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel in ("_forward", "_backward"):
        command = [str(reader), "--dump-resource-usage", str(tmp_path / kernel)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "REG:" in usage and "STACK:0" in usage and "LOCAL:0" in usage, usage


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": lambda x: x.double()}, r"u \(=torch.float64 on cpu\) must be float32, bfloat16 or"),
        ({"A": lambda x: x.double()}, r"A \(=torch.float64 on cpu\) must be float32, .*'chunked'"),
        ({"z": lambda x: x.to("meta")}, r"z \(=torch.float32 on meta\) must be .* on cpu"),
        ({"B": lambda x: x[:, :2]}, r"B \(of shape \(2, 2, 5\)\) must have shape \(2, 4, 5\)"),
        (dict.fromkeys("ABC", lambda x: x[..., :0]), r"states of A \(=0\) must be at least 1 here"),
    ],
)
def test_the_kernel_refuses_what_it_would_misread(change, message):
    from mambaflow.kernels import scan_triton

    tensors = dict(zip(NAMES, (x.float() for x in inputs(2, 4, 3, 5)), strict=True))
    tensors |= {name: work(tensors[name]) for name, work in change.items()}
    with pytest.raises(ValueError, match=message):
        unchecked(scan_triton.scan, **tensors)


def compare() -> None:
    """Print each result's largest error over what its terms add up to."""
    import torch

    from mambaflow.kernels import scan_triton
    from mambaflow.models.selective_scan import selective_scan

    def results(tensors, backend):
        return with_gradients(lambda *x: selective_scan(*x, backend=backend), tensors)

    for case in CASES:
        b, n, d, s, gate, strided, kind, rate = case
        torch.manual_seed(0)
        shapes = [(b, n, d), (b, n, d), (d, s), (b, n, s), (b, n, s), (d,), (b, n, d)]
        tensors = [torch.randn(size, dtype=torch.float64) for size in shapes[: 6 + gate]]
        tensors[1] = 3 * tensors[1] - 1
        tensors[2] = -rate * tensors[2].exp().clamp(max=3.4)  # as large as float32 can hold
        tensors = [x.to(getattr(torch, kind) if x.dim() == 3 else torch.float32) for x in tensors]
        if strided:  # rows of wider ones
            tensors = [x.repeat_interleave(2, -1)[..., : x.shape[-1]] if x.dim() == 3 else x
                       for x in tensors]  # fmt: skip
        found = results([x.detach().requires_grad_() for x in tensors], "triton")
        with torch.no_grad():  # no states are saved then
            assert torch.equal(selective_scan(*tensors, backend="triton"), found[0])
        save, gate = True, tensors[6] if gate else None
        operands = [x.detach().requires_grad_(x.dim() == 3) for x in tensors[:6]]
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(scan_triton._scan, (*operands, gate, save), test_utils=checks)
        right = results([x.detach().double().requires_grad_() for x in tensors], "reference")
        sizes = without_cancellation([x.detach().double() for x in tensors])
        for name, x, y, size in zip(("y", "u", "dt", "A", "B", "C", "D", "z"), found, right, sizes,
                                    strict=False):  # fmt: skip
            assert x.isfinite().all(), (case, name)
            error = ((x.double() - y).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)).max()
            # dy and the result are rounded, the one to the nearest, the other down.
            most = 1e-5 if kind == "float32" else 1.5 * torch.finfo(torch.bfloat16).eps
            print(case, name, float(error), most)  # noqa: T201


if __name__ == "__main__":
    compare()
