"""The compiled kernels: built once, whatever happens meanwhile, and done without where they must.

Each case is a process of its own with a cache of its own. The compiler is a script that writes a
line for every build and then runs the real one, or fails as the case asks.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REAL = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(REAL is None, reason="no C++ compiler here")

LOAD = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
from mambaflow.kernels.build import library
library(), library()
print("native" if library() else "none")
"""
SCAN = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
import torch
from mambaflow.models.mamba import Mamba
from mambaflow.models.selective_scan import fastest_backend
torch.manual_seed(0)
block, tokens = Mamba(8), torch.randn(2, 70, 8)
y = block(tokens)
y.square().sum().backward()
exact = block.double()(tokens.double())
print(fastest_backend(tokens, 16), float((y - exact).abs().max() / exact.abs().max()) < 1e-5)
"""


@dataclass
class Machine:
    """A home, a cache and a compiler that logs."""

    folder: Path

    def __post_init__(self) -> None:
        self.log, self.cache = self.folder / "builds.log", self.folder / "cache"
        self.log.touch()
        self.compiler(f'exec {REAL} "$@" -O0')  # quick to build

    def compiler(self, body: str) -> None:
        script = self.folder / "cxx"
        script.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = --version ]; then echo "a compiler {body!r}"; exit; fi\n'
            f"echo build >> {self.log}\n{body}\n"
        )
        script.chmod(0o755)

    def environment(self, **changes: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAMBAFLOW", "XDG"))}
        ours = {"CXX": str(self.folder / "cxx"), "MAMBAFLOW_CACHE": str(self.cache)}
        return {**clean, **ours, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}

    def start(self, code: str = LOAD, **changes: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", code], env=self.environment(**changes), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            cwd=self.folder,  # python -c would find the checkout before what is installed
        )  # fmt: skip

    def run(self, code: str = LOAD, **changes: str) -> tuple[str, list[str]]:
        """What it printed, and its warnings; it must end well."""
        return ended(self.start(code, **changes))

    @property
    def builds(self) -> int:
        return len(self.log.read_text().splitlines())

    @property
    def libraries(self) -> list[Path]:
        return list(self.cache.glob("kernels-*.so"))


def ended(process: subprocess.Popen) -> tuple[str, list[str]]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), [line for line in err.splitlines() if line.startswith("WARNING")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.slow
@needs_compiler
def test_many_processes_at_once_build_once(machine):
    machine.compiler(f'sleep 1; exec {REAL} "$@" -O0')  # long enough for all to come
    results = [ended(p) for p in [machine.start() for _ in range(8)]]
    assert results == [("native", [])] * 8
    assert machine.builds == 1
    assert machine.run() == ("native", []) and machine.builds == 1
    assert not list(machine.cache.glob("*building*"))


def test_without_a_compiler_one_warning_and_the_same_numbers(machine):
    out, warnings = machine.run(SCAN, CXX="", PATH=str(machine.folder / "nowhere"))
    assert out == "chunked True"
    assert len(warnings) == 1 and "no C++ compiler (CXX, g++, c++, clang++)" in warnings[0]


def test_a_broken_compiler_is_one_warning_with_its_words(machine):
    machine.compiler("echo no such header >&2; exit 1")
    out, warnings = machine.run(SCAN)
    assert out == "chunked True"
    assert machine.builds == 1 and len(warnings) == 1
    assert "failed: no such header" in warnings[0] and "fall back" in warnings[0]
    assert not machine.libraries


def test_a_compiler_that_makes_nothing_is_one_warning(machine):
    machine.compiler("exit 0")
    out, warnings = machine.run()
    assert out == "none" and len(warnings) == 1 and not machine.libraries


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied", "unsealed"])
def test_a_damaged_library_is_built_again(machine, damage):
    assert machine.run() == ("native", [])
    (built,) = machine.libraries
    whole = built.read_bytes()
    changed = bytes([*whole[:5000], whole[5000] ^ 255, *whole[5001:]])
    if damage == "unsealed":
        built.with_suffix(".sha256").unlink()
    else:
        kinds = {"truncated": whole[:5000], "changed": changed, "emptied": b""}
        built.unlink()
        built.write_bytes(kinds[damage])
    assert machine.run() == ("native", [])
    assert machine.builds == 2
    assert len(machine.libraries) == 1 and built.stat().st_size == len(whole)


@needs_compiler
@pytest.mark.slow
def test_a_build_killed_midway_is_done_by_the_next(machine):
    # Half a library, then a long wait: what is killed has begun to write.
    machine.compiler('while [ "$1" != -o ]; do shift; done; echo half > "$2"; sleep 60')
    first = machine.start()
    until(lambda: list(machine.cache.glob("*building*/made.so")))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert machine.builds == 1 and not machine.libraries
    script = machine.folder / "cxx"
    script.write_text(script.read_text().rsplit("\n", 2)[0] + f'\nexec {REAL} "$@" -O0\n')
    assert machine.run() == ("native", [])
    assert machine.builds == 2
    assert not list(machine.cache.glob("*building*"))


def until(condition, limit: float = 60.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_native_0_does_without_and_says_nothing(machine):
    assert machine.run(MAMBAFLOW_NATIVE="0") == ("none", [])
    assert machine.builds == 0


@needs_compiler
@pytest.mark.slow
def test_a_cache_that_cannot_be_written_gives_way_to_a_private_one(machine):
    (machine.folder / "file").write_text("not a folder")
    temporary = machine.folder / "tmp"
    temporary.mkdir()
    changes = {"MAMBAFLOW_CACHE": str(machine.folder / "file" / "x"), "TMPDIR": str(temporary)}
    out, warnings = machine.run(**changes)
    assert out == "native" and len(warnings) == 1 and "set MAMBAFLOW_CACHE" in warnings[0]
    (private,) = temporary.glob("mambaflow-*")
    assert private.stat().st_mode & 0o777 == 0o700 and list(private.glob("kernels-*.so"))
    assert machine.run(**changes)[0] == "native" and machine.builds == 1


@needs_compiler
def test_a_temporary_folder_open_to_others_is_not_trusted(machine):
    (machine.folder / "file").write_text("not a folder")
    private = machine.folder / f"mambaflow-{os.getuid()}"
    private.mkdir()
    private.chmod(0o777)
    cache = str(machine.folder / "file" / "x")
    out, warnings = machine.run(MAMBAFLOW_CACHE=cache, TMPDIR=str(machine.folder))
    assert out == "none" and machine.builds == 0
    assert len(warnings) == 1 and "is not this user's alone" in warnings[0]


@needs_compiler
@pytest.mark.slow
def test_another_source_is_another_library(machine):
    machine.run()
    machine.compiler(f'exec {REAL} "$@" -O0 -g')  # its version line differs
    machine.run()
    assert machine.builds == 2 and len(machine.libraries) == 2


HOMELESS = """
from pathlib import Path
def homeless():
    raise RuntimeError("Could not determine home directory.")
Path.home = homeless
"""


@needs_compiler
def test_a_user_without_a_home_has_a_private_cache(machine):
    temporary = machine.folder / "tmp"
    temporary.mkdir()
    changes = {"MAMBAFLOW_CACHE": "", "TMPDIR": str(temporary)}
    assert machine.run(HOMELESS + LOAD, **changes)[0] == "native"
    (private,) = temporary.glob("mambaflow-*")
    assert list(private.glob("kernels-*.so"))


HEADER = """
from pathlib import Path
from mambaflow.kernels import build
header = Path("more.h")
for text in ("// one", "// two"):
    header.write_text(text)
    build.build("kernels", build.SOURCES, [*build.HEADERS, header], build.FLAGS)
"""


@needs_compiler
def test_another_header_is_another_library(machine):
    machine.run(HEADER)
    assert machine.builds == 2 and len(machine.libraries) == 2


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3"])
def test_narrower_processors_get_the_same_numbers(machine, flags):
    if os.uname().machine != "x86_64":
        pytest.skip("names of x86-64 processors")
    if "v3" in flags and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AVX2 here")
    machine.compiler(f'exec {REAL} "$@" {flags}')
    select = (
        "(hundred and 33) or (extreme and native) or (convolution_is and 40-35) or compiled "
        "or gradients_are_the_definition or (finite and native) or beyond_all_bounds"
    )
    names = ("models/test_selective_scan", "models/test_mamba", "models/test_attention",
             "data/test_random_bits", "data/test_pixels")  # fmt: skip
    files = [str(ROOT / "tests" / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               *files, "-k", select]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=machine.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert machine.builds == 1 and "skipped" not in done.stdout


@pytest.mark.slow
def test_a_wheel_brings_the_source_and_builds_from_it(machine):
    pip = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet",
           "--wheel-dir", str(machine.folder)]  # fmt: skip
    made = subprocess.run([*pip, "--no-build-isolation"], capture_output=True, text=True)
    if made.returncode:
        made = subprocess.run(pip, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no wheel can be made here (no hatchling, no network): {made.stderr[-300:]}")
    (wheel,) = machine.folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = ("scan.cpp", "attention.cpp", "random.cpp", "vectors.h")
        assert {f"mambaflow/kernels/csrc/{name}" for name in names} <= set(packed.namelist())
        packed.extractall(machine.folder / "site")
    if REAL is None:
        return
    code = LOAD + "import mambaflow; print(mambaflow.__path__[0])"
    out, warnings = machine.run(code, PYTHONPATH=str(machine.folder / "site"))
    assert out.splitlines() == ["native", str(machine.folder / "site" / "mambaflow")]
    assert not warnings and machine.builds == 1
