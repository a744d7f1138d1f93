"""The compiled kernels: built on first use, cached for the user, and shared by processes.

The sources need a C++17 compiler and nothing else: no headers of Python or torch, so that one
build serves every version of both. The name of the built file holds the hash of everything that
it depends on. Set MAMBAFLOW_NATIVE=0 to do without, CXX for another compiler, and
MAMBAFLOW_CACHE for another place.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from mambaflow.kernels.compiler import constant
from mambaflow.variables import stated

CSRC = Path(__file__).parent / "csrc"
SOURCES = [CSRC / name for name in ("scan.cpp", "attention.cpp", "random.cpp")]
HEADERS = [CSRC / "vectors.h"]
# Nobody asks what errno and floating-point traps would say, and without them math vectorizes. Not
# -ffast-math: it would reorder sums, and take infinities and what is no number for impossible.
FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-std=c++17", "-shared", "-fPIC",
)  # fmt: skip
BUILD_TIMEOUT_S = 300
LANES, CHUNK, MAX_STATES, MAX_TAPS = 16, 16, 64, 8  # as in scan.cpp; loading compares them
PLACES = 2**16  # of pixels that can be ranked, as in random.cpp
SEAL = ".sha256"  # beside a library: the hash of what was built
log = logging.getLogger(__name__)


class NativeError(RuntimeError):
    """Why there are no compiled kernels here."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after one warning, where they cannot be had."""
    if stated("MAMBAFLOW_NATIVE") == "0":
        return None
    try:
        return _load(build("kernels", SOURCES, HEADERS, FLAGS))
    except (NativeError, OSError) as error:
        log.warning(
            "no native CPU kernels; scan, attention and draws fall back to slower torch code: %s",
            error,
        )
        return None


@constant  # torch.compile cannot look into a cached function
def is_built() -> bool:
    """Whether there are compiled kernels, which torch.compile may take for settled."""
    return library() is not None


def kernels() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        NativeError: there are none.
    """
    loaded = library()
    if loaded is None:
        raise NativeError("the compiled kernels are not built here; ask is_built() first")
    return loaded


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Where the kernels find a tensor; null for none, and for one that holds no numbers."""
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def int64_array(numbers: list[int]) -> ctypes.Array:
    """Sizes and strides, as the kernels read them."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def dense(x: Tensor) -> Tensor:
    """Float32, last dimension dense; rows may be part of wider ones."""
    x = x.float()  # x itself where it is float32 already
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def needs_grad(*inputs: Tensor | None) -> bool:
    """Whether a backward pass may come, for which something must be saved."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def cache_folder() -> Path:
    """Where built kernels are cached."""
    if chosen := stated("MAMBAFLOW_CACHE"):
        return Path(chosen)
    try:
        return Path(stated("XDG_CACHE_HOME") or Path.home() / ".cache") / "mambaflow"
    except RuntimeError:  # a user without a home
        return _private_folder()


def compiler() -> str:
    """The C++ compiler of this machine.

    Raises:
        NativeError: there is none.
    """
    chosen = stated("CXX")
    for name in (chosen, "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            if chosen not in ("", name):
                log.warning("CXX (=%r) is no program here; %s is taken", chosen, path)
            return path
    raise NativeError("no C++ compiler (CXX, g++, c++, clang++); install g++, or set CXX")


def _processor() -> str:
    """What -march=native depends on: the features of this processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(sorted(set(named))) or platform.processor()


def build(kind: str, sources: list[Path], headers: list[Path], flags: tuple[str, ...]) -> Path:
    """The shared library of these sources, built if it is not there.

    Raises:
        NativeError: there is no compiler, or it failed.
        OSError: no folder can hold it.
    """
    cxx = compiler()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False)
    texts = [path.read_text() for path in (*sources, *headers)]
    parts = (*texts, version.stdout, " ".join(flags), _processor(), platform.machine())
    # Machines that share a home each find a library of their own.
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    name, command = f"{kind}-{key}.so", [cxx, *flags, *map(str, sources), "-o"]
    try:
        return _build_in(cache_folder(), name, command)
    except OSError as error:
        folder = _private_folder()
        log.warning("%s cannot hold the compiled kernels (%s): using %s; set MAMBAFLOW_CACHE to "
                    "a folder that can", cache_folder(), error, folder)  # fmt: skip
        return _build_in(folder, name, command)


def _private_folder() -> Path:
    """A folder among the temporary files into which nobody else can put a library to load."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"mambaflow-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()  # of the name itself, which may be another user's link
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & 0o022:
        raise NativeError(f"{folder} is not this user's alone; remove it, or set MAMBAFLOW_CACHE")
    return folder


def _build_in(folder: Path, name: str, command: list[str]) -> Path:
    """The library in this folder; one process builds, others wait."""
    path = folder / name
    if _is_intact(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=2 * BUILD_TIMEOUT_S):
        if not _is_intact(path):  # another process may have built it meanwhile
            for left in folder.glob(f"{name}.building-*"):  # by a process killed at this
                shutil.rmtree(left, ignore_errors=True)
            _compile(command, path)
    return path


def _compile(command: list[str], path: Path) -> None:
    # Beside `path`, on one file system, so that os.replace moves it whole or not at all.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.building-") as folder:
        made = Path(folder) / "made.so"
        command = [*command, str(made)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise NativeError(f"{command[0]} took over {BUILD_TIMEOUT_S} s") from error
        if done.returncode or not made.exists():
            raise NativeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}")
        seal = made.with_suffix(SEAL)
        seal.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, path)
        os.replace(seal, path.with_suffix(SEAL))  # last: without a seal it is built again


def _is_intact(path: Path) -> bool:
    """Whether the file is as it was built: loading a truncated library kills the process."""
    seal = path.with_suffix(SEAL)
    if not (path.exists() and seal.exists()):
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == seal.read_text()


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    names = ("lanes", "chunk", "states", "taps", "places")
    limits = tuple(getattr(loaded, f"mambaflow_{name}")() for name in names)
    if limits != (LANES, CHUNK, MAX_STATES, MAX_TAPS, PLACES):
        raise NativeError(f"{path} was built for other sizes, {limits}; remove it")
    return loaded
