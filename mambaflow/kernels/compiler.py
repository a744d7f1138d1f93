"""What torch.compile is told of functions, without loading it.

torch.compiler's own decorators import TorchDynamo, which takes more than a second in every process,
of a job's as of a cluster's, and most of them compile nothing.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """torch.compile takes what it returns for settled: torch.compiler.assume_constant_result, which
    sets this mark and nothing else."""
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


def opaque(function: Callable[P, T], used: bool) -> Callable[P, T]:
    """The function, into which torch.compile does not look: that is torch.compiler.disable, and
    nothing where the function cannot be `used`."""
    return torch.compiler.disable(function) if used else function
