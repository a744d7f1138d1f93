"""MKL's AVX-512 matrix products on AMD's processors, where torch gets its slower ones.

    export LD_PRELOAD=$(python -m mambaflow.mkl)

MKL takes AVX-512 on processors that it knows for Intel's alone: it asks a function of its own
which they are. A library of that one function, loaded before torch, answers for AMD's, whose
AVX-512 is the same. It prints a path, or nothing where nothing is to be gained, and says why.
"""

import logging
import platform
import sys
from pathlib import Path

import torch

from mambaflow.native import NativeError, build

SOURCE = Path(__file__).parent / "csrc" / "mkl.cpp"
FLAGS = ("-O2", "-shared", "-fPIC", "-nostdlib")
log = logging.getLogger(__name__)


def needless(processor: str) -> str:
    """Why the library would do nothing on a machine with this /proc/cpuinfo; or empty."""
    if platform.machine() != "x86_64" or not torch.backends.mkl.is_available():
        return "this torch has no MKL"
    if "AuthenticAMD" not in processor:
        return "the processor is not AMD's"
    return "" if "avx512f" in processor else "the processor has no AVX-512"


def _loadable(path: Path) -> Path:
    if set(" :") & set(str(path)):  # where LD_PRELOAD ends a name
        raise NativeError(f"{path} holds a space or colon; set MAMBAFLOW_CACHE to a plain path")
    return path


def main() -> int:
    """Print the path of the library, built if it is not there; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    info = Path("/proc/cpuinfo")
    why = needless(info.read_text() if info.exists() else "")
    if why:
        log.info("MKL is left as it is: %s", why)
        return 0
    try:
        sys.stdout.write(f"{_loadable(build('mkl', [SOURCE], FLAGS))}\n")
    except (NativeError, OSError) as error:
        log.warning("MKL is left as it is: %s", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
