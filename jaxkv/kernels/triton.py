"""Pallas' Triton backend, which JAX deprecated in 0.11 (it works in 0.12): the one place that knows
it, besides masked loads and stores."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


def on_triton(
    kernel: Callable[..., None], name: str, num_warps: int, num_stages: int, **call: Any
) -> Callable[..., Any]:
    """`pl.pallas_call` on the Triton backend."""
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
    )  # it comes at lowering, after this
    params = triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=params, name=name, **call)
