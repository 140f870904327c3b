"""What a program is compiled for, as far as a trace can tell."""

from __future__ import annotations

import functools
import pathlib

import jax

LEAST_CAPABILITY = 8.0  # Ampere: products of bfloat16, asynchronous copies


def name() -> str:
    """The platform: that of a mesh's device, which may be elsewhere, or the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else device.platform
    return "gpu" if found == "cuda" else found


def is_tiled() -> bool:
    """Whether memory holds arrays in tiles of their last two axes, so that another shape of the
    same bytes is a copy, and so is a scatter."""
    return name() == "tpu"


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32: not on CPUs without units for
    them."""
    return name() != "cpu" or _cpu_has_bfloat16()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    info = pathlib.Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def visits_rows() -> bool:
    """Whether a batch may be taken apart: on CPUs, unless its rows may lie on several devices (only
    manual meshes tell)."""
    mesh = jax.sharding.get_abstract_mesh()
    is_own = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return name() == "cpu" and (is_own or jax.device_count() == 1)


def no_gpu() -> str | None:
    """Why no NVIDIA GPU can be compiled for here, or None."""
    if name() != "gpu":
        return f"it runs on NVIDIA GPUs, not on {name()}"
    if jax.default_backend() != "gpu":
        return None  # an abstract device stands for one elsewhere
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    try:
        enough = float(capability) >= LEAST_CAPABILITY
    except ValueError:  # AMD's names
        enough = False
    least = f"compute capability {LEAST_CAPABILITY} or more"
    return None if enough else f"it needs an NVIDIA GPU of {least}, not {capability}"
