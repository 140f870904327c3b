"""Lowering for a GPU from a machine that has none."""

from __future__ import annotations

from typing import Any

import jax
from jax import export

H100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
KERNEL = "__gpu$xla.gpu.triton"


def lowered(function: Any, *arguments: Any, platform: str = "cuda") -> str:
    """The program's text; for cuda, inside the fixture `gpu`."""
    checks = [export.DisabledSafetyCheck.custom_call(KERNEL)]
    return export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(
        *arguments
    ).mlir_module()
