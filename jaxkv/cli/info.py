"""`jaxkv info`: versions, devices, and which implementation each preset gets here."""

from __future__ import annotations

import argparse
import json
import platform as machine
from typing import Any

import jax
from jaxlib.version import __version__ as jaxlib_version

import jaxkv
from jaxkv import platform
from jaxkv.kernels import dispatch
from jaxkv.scoring import Scoring
from jaxkv.state import segments

KNOWN_FAULTS = [
    # (jaxlib from, to, platform, what happens, what to do)
    (
        (0, 11, 1),
        (0, 11, 1),
        "cpu",
        "a small write in a tiny loop rewrites its whole buffer (jax-ml/jax#40101)",
        "XLA_FLAGS=--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=0, "
        "or another version",
    ),
    (
        (0, 10, 0),
        (0, 10, 2),
        "cpu",
        "sums of more than 32,768 products under vmap may be wrong (jax-ml/jax#39103)",
        "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce for your own model; "
        "nothing here has the shape",
    ),
]
"""Faults of published jaxlib versions that users of a cache may meet."""


def add_to(commands: Any) -> None:
    """Adds the command and its flags."""
    command = commands.add_parser("info", help="versions, devices, implementations, known faults")
    command.set_defaults(run=run)
    command.add_argument("--head-dim", type=int, default=128)
    command.add_argument("--json", action="store_true", help="JSON instead of text")


def run(options: argparse.Namespace) -> None:
    """Prints what a bug report needs."""
    found: dict[str, Any] = {
        "jaxkv": jaxkv.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "python": machine.python_version(),
        "devices": [f"{device.device_kind} ({device.platform})" for device in jax.devices()],
        "presets": {name: _implementation(name, options.head_dim) for name in jaxkv.PRESETS},
        "faults": faults(jaxlib_version, platform.name()),
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"jaxkv {found['jaxkv']}, jax {found['jax']}, jaxlib {found['jaxlib']}", end="")
    print(f", Python {found['python']}")
    print(f"devices: {', '.join(found['devices'])}\n")
    for name, implementation in found["presets"].items():
        print(f"{name:10} {implementation}")
    for fault in found["faults"]:
        print(f"\nknown fault of this jaxlib: {fault}")


def _implementation(preset: str, head_dim: int) -> str:
    """What attends over the preset's last tier here, and why not the GPU kernel."""
    config = jaxkv.preset(preset, max_tokens=1024, num_kv_heads=8, head_dim=head_dim)
    last = segments(jaxkv.init(config))[-1]
    reason = dispatch.refusal(last, head_dim, Scoring()) or platform.no_gpu()
    return f"XLA; no kernel: {reason}" if reason else "Pallas kernel"


def faults(version: str, backend: str) -> list[str]:
    """The known faults of a jaxlib version on a platform."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    return [
        f"{effect}: {remedy}"
        for first, last, where, effect, remedy in KNOWN_FAULTS
        if first <= numbers <= last and where == backend
    ]
