"""Typed decorator for functions whose result torch.compile treats as a constant."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def assume_constant(function: Callable[P, T]) -> Callable[P, T]:
    """Make torch.compile evaluate a function once, while it traces, instead of tracing it."""
    decorated: Callable[P, T] = torch.compiler.assume_constant_result(function)
    return decorated
