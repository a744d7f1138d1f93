"""Refusing bad input at the border: one home for the words in which it is done.

A message names the value, the rule and the cure: "batch_size (=10) must be divisible by world
size (=4); use 8 or 12".
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def lookup(registry: Mapping[str, T], name: str, what: str) -> T:
    """The entry called `name`; an unknown name is refused with the list of valid ones."""
    require(name in registry, f"unknown {what} {name!r}; valid: {', '.join(registry)}")
    return registry[name]


def require_positive(config: object, *names: str) -> None:
    """Refuse fields that are not finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        # An int's cure is a whole number; a rate is not told to be 1 or more.
        cure = "1 or more" if isinstance(value, int) else "a number above 0"
        # Written so that NaN, of which every comparison is false, is refused.
        require(0 < value < math.inf, f"{name} (={value}) must be positive; use {cure}")


def require_not_negative(config: object, *names: str) -> None:
    """Refuse fields that are not finite numbers from 0 up."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < math.inf, f"{name} (={value}) must not be negative; use 0 or more")


def require_share(config: object, *names: str) -> None:
    """Refuse fields that are not shares of a whole."""
    for name in names:
        value = getattr(config, name)
        # NaN is refused here too.
        require(0 <= value <= 1, f"{name} (={value}) must be in [0, 1]; use a share such as 0.1")


def require_seed(config: object, *names: str) -> None:
    """Refuse fields that are not words of 32 bits, which the random draws are functions of."""
    for name in names:
        value = getattr(config, name)
        # A seed is a word of the key that every draw has (see data.random_bits).
        require(0 <= value < 2**32, f"{name} (={value}) must be in [0, 2^32); use 0")


def require_types(config: Any) -> None:
    """Refuse a dataclass of which a field is not of its type, such as text where JSON should have
    had a number: a dataclass itself looks at none, and a command line at its own alone."""
    # Resolved, with the text in `Annotated` dropped: the type itself.
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        # Literals and plain classes: of list[int] and its like the items would have to be looked at
        # too, and no configuration has such a field.
        if typing.get_origin(hint) is Literal:
            valid = ", ".join(map(repr, typing.get_args(hint)))
            require(value in typing.get_args(hint), f"{f.name} (={value!r}) must be one of {valid}")
        elif isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
            require(
                _is_a(value, hint),
                f"{f.name} (={value!r}) must be {hint.__name__}, not {type(value).__name__}",
            )


def _is_a(value: object, kind: type) -> bool:
    """As isinstance, but an int will do for a float, and a bool is not an int."""
    # Python's bool is an int: `true` in JSON would be a width of 1.
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)
