"""MKL's AVX-512 kernels on AMD's processors: used where asked for, and right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambaflow.mkl import needless

PROCESSOR = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
PRODUCT = """
import hashlib, torch
torch.manual_seed(0)
a, b = torch.randn(2, 512, 512)
c = a @ b
right = a.double() @ b.double()
assert (c - right).abs().max() < 1e-5 * right.abs().max()
print(hashlib.sha256(c.numpy().tobytes()).hexdigest())
"""


def ran(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, text=True, capture_output=True,
        check=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        ("vendor_id : AuthenticAMD\nflags : fma avx2 avx512f", ""),
        ("vendor_id : AuthenticAMD\nflags : fma avx2", "the processor has no AVX-512"),
        ("vendor_id : GenuineIntel\nflags : avx512f", "the processor is not AMD's"),
        ("", "the processor is not AMD's"),
    ],
)
def test_only_amds_avx512_has_something_to_gain(processor, why, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    assert needless(processor) == why


def test_without_mkl_there_is_nothing_to_gain(monkeypatch):
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    assert needless("vendor_id : AuthenticAMD\nflags : avx512f") == "this torch has no MKL"


@pytest.mark.skipif(needless(PROCESSOR) != "", reason=f"{needless(PROCESSOR)} here")
def test_products_come_from_other_kernels_and_are_right(tmp_path):
    found = ran("-m", "mambaflow.mkl", MAMBAFLOW_CACHE=str(tmp_path))
    library = found.stdout.strip()
    assert library.endswith(".so") and Path(library).parent == tmp_path and not found.stderr
    plain = ran("-c", PRODUCT, LD_PRELOAD="")
    loaded = ran("-c", PRODUCT, LD_PRELOAD=library)
    assert not loaded.stderr, "the loader must have found it"
    assert plain.stdout != loaded.stdout, "sums in another order: other kernels ran"


@pytest.mark.skipif(needless(PROCESSOR) != "", reason=f"{needless(PROCESSOR)} here")
def test_without_a_compiler_nothing_is_loaded_and_the_reason_is_told(tmp_path):
    done = ran("-m", "mambaflow.mkl", CXX="", PATH="", MAMBAFLOW_CACHE=str(tmp_path))
    assert done.stdout == "" and "no C++ compiler" in done.stderr
