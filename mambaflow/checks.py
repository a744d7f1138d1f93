"""Refusing bad input at the border: one home for the words in which it is done."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def lookup(registry: Mapping[str, T], name: str, what: str) -> T:
    """The entry called `name`; an unknown name is refused with the list of valid ones."""
    require(name in registry, f"unknown {what} {name!r}; valid: {', '.join(registry)}")
    return registry[name]
